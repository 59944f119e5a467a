"""The words, names and numbers that the generators draw from, and small ways to draw them."""

from datetime import UTC, datetime, timedelta
from random import Random

GIVEN = (
    "Amara Anselm Beatriz Björn Chidi Chloé Dagny Dmitri Eilidh Emre Farida Fionn Gaëlle Goran Hiroko "
    "Ibrahim Ingrid Jamal Jiří Katarzyna Kofi Lucía Lwazi Marguerite Mehmet Nadia Ngozi Olumide Oriol "
    "Paloma Priya Quentin Rasmus Renata Samir Siobhán Tadeusz Thandiwe Ulrike Valentín Wanjiru Xiomara "
    "Yusuf Zoë"
).split()
FAMILY = (
    "Abernathy Adeyemi Ågren Bakshi Baptiste Castellanos Čapek Delacroix Eriksen Falkner Fernández "
    "Grünwald Haddad Hashimoto Iyer Jankowski Kapoor Kovačević Lindqvist MacLeod Mbeki Moreau Nakamura "
    "Ndiaye O'Hara Okafor Papadakis Quispe Rosenthal Sandoval Szabó Tanaka Ulvaeus Vasquez Whitlock "
    "Yamada Zieliński"
).split()
CITIES = (
    "Aarhus Accra Bilbao Brno Cork Dakar Gdańsk Graz Hanoi İzmir Kraków La~Paz Leeds Lyon Malmö "
    "Montréal Nairobi Oaxaca Osaka Porto Quito Rīga São~Paulo Split Tbilisi Tromsø Utrecht Valparaíso "
    "Winnipeg Zürich 上海 京都"
).split()
STREETS = "Alder Bellwether Canal Dovecote Elm Foundry Granary Harbour Ivy Kiln Lantern Mill Orchard".split()
ADJECTIVES = (
    "amber brittle coarse damp eager faded gentle hollow idle jagged keen lean mellow narrow opaque "
    "plain quiet rough sharp tidy uneven vivid warm worn young zinc"
).split()
NOUNS = (
    "anchor basket bearing beacon bracket candle chisel crate dynamo easel fender gasket hinge inkwell "
    "jacket kettle ladder lantern mortar needle oar pulley quilt ratchet saddle shuttle tarp trowel "
    "valve wheel yoke"
).split()
VERBS = (
    "accepted archived assigned cancelled checked closed delayed delivered dropped escalated filed held "
    "inspected labelled merged moved opened packed queued rejected repaired replaced returned scheduled "
    "sent split stored"
).split()
SERVICES = (
    "auth billing cart catalog checkout courier exporter gateway geocoder inventory ledger mailer "
    "matcher notifier orders pricing profile ranker reports scheduler search sessions thumbnails "
    "webhooks"
).split()
STATES = "active blocked cancelled done draft failed pending queued running waiting".split()
UNITS = "bar cm dB g h Hz kg km kPa kWh L lx m mm mol N s V W".split()
CURRENCIES = "AUD BRL CHF CZK DKK EUR GBP INR JPY KES MXN NOK PLN SEK USD ZAR".split()
NOTES = (
    "the {noun} was {verb} twice",
    "please ask {name} before the {adjective} {noun} is {verb}",
    'label reads "{adjective} {noun}", but the box holds a {noun}',
    "customer in {city} says it is too {adjective}; we {verb} it",
    "{name} {verb} it, then {verb} it again (see note {number})",
    "waiting for {number} more {noun}s from {city}",
    "seal broken, contents {adjective}, {number} % usable",
    "moved to shelf {number}, next to the {noun}s",
    "{name}: “not my {noun}, ask {city}”",
    "no {noun} found; {verb} by hand on request of {name}",
)


def name(rng: Random) -> str:
    """A given and a family name."""
    return f"{rng.choice(GIVEN)} {rng.choice(FAMILY)}"


def city(rng: Random) -> str:
    """A town, sometimes with a space in its name, sometimes in another script."""
    return rng.choice(CITIES).replace("~", " ")


def thing(rng: Random) -> str:
    """An adjective and a noun: a product, a title, a label."""
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def slug(rng: Random) -> str:
    """The same as an identifier, with a number."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}-{rng.randrange(1000)}"


def note(rng: Random) -> str:
    """One remark of the sort that people type into a field named "comment"."""
    return rng.choice(NOTES).format(
        noun=rng.choice(NOUNS),
        adjective=rng.choice(ADJECTIVES),
        verb=rng.choice(VERBS),
        name=name(rng),
        city=city(rng),
        number=rng.randrange(2, 900),
    )


def ascii_only(text: str) -> str:
    """`text` without its non-ASCII characters, for addresses and user names."""
    return "".join(c for c in text.lower() if c.isascii() and (c.isalnum() or c == " "))


def email(rng: Random) -> str:
    """An address at a domain reserved for examples (RFC 2606)."""
    local = ascii_only(name(rng)).strip().replace(" ", rng.choice("._-"))
    return f"{local}{rng.choice(('', str(rng.randrange(100))))}@example.{rng.choice(('com', 'org', 'net'))}"


def hexadecimal(rng: Random, digits: int) -> str:
    """`digits` random hexadecimal digits."""
    return f"{rng.getrandbits(4 * digits):0{digits}x}"


def uuid(rng: Random) -> str:
    """A version 4 UUID (RFC 9562)."""
    h = hexadecimal(rng, 32)
    return f"{h[:8]}-{h[8:12]}-4{h[13:16]}-{rng.choice('89ab')}{h[17:20]}-{h[20:]}"


def address(rng: Random) -> str:
    """An IPv4 address, mostly private; now and then an IPv6 one of the documentation prefix (RFC 3849)."""
    if rng.random() < 0.12:
        return f"2001:db8:{hexadecimal(rng, 4)}::{rng.randrange(1, 256):x}"
    network = rng.choice(
        ("10.{}.{}.{}", "192.168.{1}.{2}", "172.16.{1}.{2}", "203.0.113.{2}", "198.51.100.{2}")
    )
    return network.format(*(rng.randrange(1, 255) for _ in range(3)))


def moment(rng: Random) -> datetime:
    """A second between 2009 and 2029, UTC."""
    return datetime(2009, 1, 1, tzinfo=UTC) + timedelta(seconds=rng.randrange(20 * 365 * 86400))


def money(rng: Random, limit: int = 100_000) -> str:
    """An amount with two decimals, below `limit` / 100."""
    cents = rng.randrange(1, limit)
    return f"{cents // 100}.{cents % 100:02d}"


def decimal(rng: Random, limit: int, places: int) -> float:
    """A float in [0, limit) with at most `places` decimals, the nearest double to it."""
    scale: int = 10**places
    return rng.randrange(limit * scale) / scale
