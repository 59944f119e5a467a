"""Logs: web servers, syslog, kernels, Python and Java programs, logfmt, builds, metrics."""

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from random import Random

from scripts.generators import words

# Not strftime's %b, which follows the locale.
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
AGENTS = (
    "Mozilla/5.0 (X11; Linux x86_64; rv:{}.0) Gecko/20100101 Firefox/{}.0",
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 Chrome/{}.0.{}.0 Safari/537.36",
    "curl/8.{}.{}",
    "python-requests/2.{}.{}",
    "ExampleBot/{}.{} (+https://example.org/bot)",
    "-",
)
LEVELS = ("DEBUG", "INFO", "INFO", "INFO", "WARNING", "ERROR")
FAULTS = (
    "connection to {address} refused",
    "timed out after {number} ms waiting for {service}",
    "unexpected key {noun!r} in reply of {service}",
    "{noun} {number} not found",
    "disk quota exceeded on /var/lib/{service}",
    "checksum mismatch: expected {hash}, got {other}",
    "invalid literal for int() with base 10: {noun!r}",
)
CHATTER = (
    "started {service} in {number} ms",
    "{noun} {number} {verb} for {service}",
    "cache {noun}s: {number} hits, {count} misses",
    "retrying {service} (attempt {count})",
    "user {user} {verb} {noun} {hash}",
    "queue depth {number}, oldest {count} s",
    "loaded {number} {noun}s from /srv/{service}/{noun}.db",
    "listening on {address}:{number}",
)


def _fill(rng: Random, template: str) -> str:
    return template.format(
        address=words.address(rng),
        number=rng.randrange(1, 30_000),
        count=rng.randrange(1, 300),
        service=rng.choice(words.SERVICES),
        noun=rng.choice(words.NOUNS),
        verb=rng.choice(words.VERBS),
        hash=words.hexadecimal(rng, 8),
        other=words.hexadecimal(rng, 8),
        user=words.ascii_only(rng.choice(words.GIVEN)),
    )


def _message(rng: Random) -> str:
    return _fill(rng, rng.choice(CHATTER if rng.random() < 0.75 else FAULTS))


def _clock(rng: Random) -> Iterator[datetime]:
    """Moments that go forward in bursts."""
    moment = words.moment(rng)
    while True:
        moment += timedelta(microseconds=rng.randrange(1, rng.choice((2_000, 900_000, 40_000_000))))
        yield moment


def _web(rng: Random, moment: datetime) -> str:
    """Combined log format of Apache and nginx."""
    path = "/".join(
        ("", rng.choice(words.SERVICES), words.slug(rng), *(("edit",) if rng.random() < 0.2 else ()))
    )
    query = f"?page={rng.randrange(1, 40)}&q={rng.choice(words.NOUNS)}" if rng.random() < 0.3 else ""
    agent = rng.choice(AGENTS).format(rng.randrange(10, 150), rng.randrange(10, 6_000))
    status = rng.choice((200, 200, 200, 204, 301, 304, 400, 401, 404, 404, 429, 500, 502))
    verb = rng.choice(("GET", "GET", "GET", "POST", "PUT", "DELETE", "HEAD"))
    when = f"{moment:%d}/{MONTHS[moment.month - 1]}/{moment:%Y:%H:%M:%S}"
    return (
        f"{words.address(rng)} - {rng.choice(('-', words.ascii_only(rng.choice(words.GIVEN))))} "
        f'[{when} +0000] "{verb} {path}{query} HTTP/1.1" {status} '
        f'{rng.randrange(90_000)} "{rng.choice(("-", "https://example.com" + path))}" "{agent}"'
    )


def _syslog(rng: Random, moment: datetime) -> str:
    host = f"{rng.choice(words.ADJECTIVES)}{rng.randrange(1, 20):02d}"
    tag = rng.choice(("sshd", "cron", "systemd", "dhclient", "postfix/smtpd", rng.choice(words.SERVICES)))
    when = f"{MONTHS[moment.month - 1]} {moment.day:2d} {moment:%H:%M:%S}"
    return f"{when} {host} {tag}[{rng.randrange(100, 60_000)}]: {_message(rng)}"


def _kernel(rng: Random, moment: datetime) -> str:
    seconds = (moment.hour * 3600 + moment.minute * 60 + moment.second) % 90_000
    bus = f"{rng.randrange(4):04x}:{rng.randrange(32):02x}:{rng.randrange(32):02x}.{rng.randrange(8)}"
    text = rng.choice(
        (
            f"pci {bus}: BAR {rng.randrange(6)}: assigned [mem 0x{words.hexadecimal(rng, 8)} 64bit]",
            f"usb {rng.randrange(1, 9)}-{rng.randrange(1, 9)}: new USB device number {rng.randrange(99)}",
            f"EXT4-fs (sd{rng.choice('abcd')}{rng.randrange(1, 6)}): mounted {words.uuid(rng)} r/w",
            f"eth{rng.randrange(4)}: link up, {rng.choice((100, 1000, 2500))} Mbps, full duplex",
            f"Out of memory: Killed process {rng.randrange(300, 90_000)} ({rng.choice(words.SERVICES)})",
        )
    )
    return f"[{seconds:5d}.{moment.microsecond:06d}] {text}"


def _python(rng: Random, moment: datetime) -> str:
    """Python's logging, now and then with a traceback."""
    level, service = rng.choice(LEVELS), rng.choice(words.SERVICES)
    when = f"{moment:%Y-%m-%d %H:%M:%S},{moment.microsecond // 1000:03d}"
    head = f"{when} {level:<8} {service}.{rng.choice(words.NOUNS)}"
    if level != "ERROR" or rng.random() < 0.4:
        return f"{head}: {_message(rng)}"
    frames = "".join(
        f'  File "/srv/{service}/{rng.choice(words.NOUNS)}.py", line {rng.randrange(5, 900)}, '
        f"in {rng.choice(words.VERBS)}_{rng.choice(words.NOUNS)}\n"
        for _ in range(rng.randrange(2, 5))
    )
    fault = rng.choice(("ValueError", "KeyError", "TimeoutError", "OSError", "RuntimeError"))
    cause = _fill(rng, rng.choice(FAULTS))
    return f"{head}: request failed\nTraceback (most recent call last):\n{frames}{fault}: {cause}"


def _java(rng: Random, moment: datetime) -> str:
    """A Java service, now and then with a stack trace."""
    level, service = rng.choice(LEVELS), rng.choice(words.SERVICES)
    kind = rng.choice(words.NOUNS).title() + rng.choice(("Service", "Factory", "Handler", "Repository"))
    thread = (
        f"{rng.choice(('http-nio', 'pool', 'kafka'))}-{rng.randrange(1, 9)}-thread-{rng.randrange(1, 64)}"
    )
    when = moment.isoformat(timespec="milliseconds")
    line = f"{when} [{thread}] {level:<7} o.example.{service}.{kind} - {_message(rng)}"
    if level != "ERROR":
        return line
    frames = "".join(
        f"\n\tat org.example.{service}.{kind}.{rng.choice(words.VERBS)}({kind}.java:{rng.randrange(20, 700)})"
        for _ in range(rng.randrange(2, 6))
    )
    return f"{line}\njava.lang.IllegalStateException: {_fill(rng, rng.choice(FAULTS))}{frames}"


def _logfmt(rng: Random, moment: datetime) -> str:
    pairs = {
        "time": f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z",
        "level": rng.choice(LEVELS).lower(),
        "msg": f'"{_message(rng)}"',
        "service": rng.choice(words.SERVICES),
        "trace_id": words.hexadecimal(rng, 32),
        "duration": f"{words.decimal(rng, 900, 3)}ms",
    }
    return " ".join(f"{key}={value}" for key, value in pairs.items())


def _build(rng: Random, moment: datetime) -> str:
    """A compiler and a test runner, by turns."""
    unit = f"src/{rng.choice(words.SERVICES)}/{rng.choice(words.NOUNS)}"
    return rng.choice(
        (
            f"[{rng.randrange(1, 400):3d}/400] Building CXX object {unit}.cpp.o",
            f"{unit}.cpp:{rng.randrange(1, 900)}:{rng.randrange(1, 90)}: warning: unused variable "
            f"'{rng.choice(words.NOUNS)}' [-Wunused-variable]",
            f"tests/{unit}_test.py::test_{rng.choice(words.VERBS)}_{rng.choice(words.NOUNS)} "
            f"{rng.choice(('PASSED', 'PASSED', 'SKIPPED', 'FAILED'))} [{rng.randrange(1, 101):3d}%]",
            f"{moment:%H:%M:%S} step {rng.randrange(1, 40)}: {_message(rng)}",
        )
    )


def _metrics(rng: Random, moment: datetime) -> str:
    """The text exposition format of Prometheus."""
    metric = f"{rng.choice(words.SERVICES)}_{rng.choice(words.NOUNS)}s_total"
    labels = f'{{host="{words.slug(rng)}",state="{rng.choice(words.STATES)}"}}'
    return f"{metric}{labels} {rng.randrange(10**6)} {int(moment.timestamp() * 1000)}"


FORMATS: tuple[Callable[[Random, datetime], str], ...] = (
    _web,
    _syslog,
    _kernel,
    _python,
    _java,
    _logfmt,
    _build,
    _metrics,
)


def document(rng: Random) -> str:
    """An excerpt of one log, in one format, in the order of time."""
    line, clock = rng.choice(FORMATS), _clock(rng)
    return "".join(f"{line(rng, next(clock))}\n" for _ in range(rng.randrange(6, 16)))
