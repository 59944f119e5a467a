"""Arithmetic with its working shown, and every line of it true."""

from collections.abc import Callable
from fractions import Fraction
from math import gcd
from random import Random

from scripts.generators import words

# How a sheet writes "times"; the exercises below all write an asterisk.
TIMES = ("*", "*", "\N{MULTIPLICATION SIGN}", "\N{MIDDLE DOT}", "\\times")


def _addition(rng: Random) -> list[str]:
    """Column addition from the right, carries named."""
    a, b = rng.randrange(100, 10**6), rng.randrange(100, 10**6)
    carry, lines = 0, [f"{a} + {b}"]
    for place in range(len(str(max(a, b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        working = f"{x} + {y}" + (" + 1" if carry else "") + f" = {total}"
        carry = total // 10
        lines.append(f"  10^{place}: {working}, write {total % 10}" + (", carry 1" if carry else ""))
    return [*lines, f"{a} + {b} = {a + b}"]


def _multiplication(rng: Random) -> list[str]:
    """Partial products, then their sum."""
    a, b = rng.randrange(12, 10**4), rng.randrange(12, 1000)
    parts = [(int(digit) * 10**place) for place, digit in enumerate(reversed(str(b))) if digit != "0"]
    lines = [f"{a} * {b}:"] + [f"  {a} * {part} = {a * part}" for part in parts]
    return [*lines, f"  {' + '.join(str(a * part) for part in parts)} = {a * b}", f"{a} * {b} = {a * b}"]


def _division(rng: Random) -> list[str]:
    """Long division, digit by digit."""
    a, b = rng.randrange(1000, 10**6), rng.randrange(3, 98)
    rest, lines = 0, [f"{a} ÷ {b}"]
    for digit in str(a):
        rest = 10 * rest + int(digit)
        lines.append(f"  bring down {digit}: {rest} = {rest // b} * {b} + {rest % b}")
        rest %= b
    return [*lines, f"{a} = {a // b} * {b} + {a % b}, so the quotient is {a // b} and the remainder {a % b}"]


def _fractions(rng: Random) -> list[str]:
    """A sum or difference of fractions over a common denominator, reduced."""
    a, b, c, d = rng.randrange(1, 30), rng.randrange(2, 30), rng.randrange(1, 30), rng.randrange(2, 30)
    sign = rng.choice("+-")
    common = b * d // gcd(b, d)
    x, y = a * common // b, c * common // d
    top = x + y if sign == "+" else x - y
    value = Fraction(top, common)
    return [
        f"{a}/{b} {sign} {c}/{d}",
        f"= {x}/{common} {sign} {y}/{common}   (lcm of {b} and {d} is {common})",
        f"= {top}/{common}" + (f" = {value}" if str(value) != f"{top}/{common}" else ""),
    ]


def _euclid(rng: Random) -> list[str]:
    """Euclid's algorithm."""
    g = rng.randrange(1, 60)
    a, b = g * rng.randrange(20, 400), g * rng.randrange(20, 400)
    lines, x, y = [f"gcd({a}, {b})"], max(a, b), min(a, b)
    while y:
        lines.append(f"  {x} = {x // y} * {y} + {x % y}")
        x, y = y, x % y
    return [*lines, f"gcd({a}, {b}) = {x}"]


def _factors(rng: Random) -> list[str]:
    """Division by ever larger primes."""
    n = rng.randrange(200, 60_000)
    lines, found, rest, p = [f"Factor {n}."], list[int](), n, 2
    while p * p <= rest:
        if rest % p:
            p += 1
            continue
        lines.append(f"  {rest} / {p} = {rest // p}")
        found.append(p)
        rest //= p
    found.append(rest)
    return [*lines, f"{n} is prime." if len(found) == 1 else f"{n} = {' * '.join(map(str, found))}"]


def _equation(rng: Random) -> list[str]:
    """a·x + b = c·x + d with a whole solution."""
    x, a, c = rng.randrange(-40, 41), rng.randrange(5, 40), rng.randrange(-20, 5)
    b = rng.randrange(1, 300)
    d = a * x + b - c * x
    term = f"{abs(c)}x" if abs(c) != 1 else "x"
    right = f"{d}" if c == 0 else f"{d} {'+' if c > 0 else '-'} {term}"
    return [
        f"{a}x + {b} = {right}",
        f"{a - c}x + {b} = {d}",
        f"{a - c}x = {d} - {b} = {d - b}",
        f"x = {d - b} / {a - c} = {x}",
        f"check: {a} * {x} + {b} = {a * x + b}",
    ]


def _brackets(rng: Random) -> list[str]:
    """The order of operations, one step a line."""
    a, b, c, d, e = (rng.randrange(2, 40) for _ in range(5))
    return [
        f"{a} + {b} * ({c} - {d}) - {e}^2",
        f"= {a} + {b} * ({c - d}) - {e}^2",
        f"= {a} + {b} * ({c - d}) - {e * e}",
        f"= {a} + ({b * (c - d)}) - {e * e}",
        f"= {a + b * (c - d)} - {e * e}",
        f"= {a + b * (c - d) - e * e}",
    ]


def _base(rng: Random) -> list[str]:
    """A number in another base, by repeated division, and back."""
    n, base = rng.randrange(40, 9000), rng.choice((2, 3, 5, 7, 8, 16))
    lines, digits, rest = [f"{n} in base {base}:"], "", n
    while rest:
        digit = "0123456789abcdef"[rest % base]
        lines.append(
            f"  {rest} = {rest // base} * {base} + {rest % base}" + (f" ({digit})" if rest % base > 9 else "")
        )
        digits, rest = digit + digits, rest // base
    return [*lines, f"read upwards: {digits}", f"{n} = {digits} (base {base})"]


def _power(rng: Random) -> list[str]:
    """Modular exponentiation by squaring."""
    a, e, m = rng.randrange(2, 50), rng.randrange(9, 200), rng.randrange(11, 400)
    lines, square, result = [f"{a}^{e} mod {m}, where {e} = {e:b} in binary"], a % m, 1
    for i, bit in enumerate(reversed(f"{e:b}")):
        if bit == "1":
            product = result * square
            lines.append(f"  {a}^{2**i} = {square}; {result} * {square} = {product} = {product % m} mod {m}")
            result = product % m
        square = square * square % m
    return [*lines, f"{a}^{e} = {result} mod {m}"]


def _statistics(rng: Random) -> list[str]:
    """Mean, median and range of a handful of numbers."""
    data = [rng.randrange(1, 200) for _ in range(rng.choice((5, 7, 9)))]
    ordered, total = sorted(data), sum(data)
    low, high, mean = ordered[0], ordered[-1], Fraction(total, len(data))
    return [
        f"Data: {', '.join(map(str, data))}",
        f"sum = {' + '.join(map(str, data))} = {total}",
        f"mean = {total}/{len(data)}" + (f" = {mean}" if mean.denominator < len(data) else ""),
        f"sorted: {', '.join(map(str, ordered))}",
        f"median = {ordered[len(data) // 2]}, range = {high} - {low} = {high - low}",
    ]


def _series(rng: Random) -> list[str]:
    """The sum of an arithmetic series by pairing its ends."""
    first, step, n = rng.randrange(1, 60), rng.randrange(2, 15), rng.randrange(6, 60)
    last = first + (n - 1) * step
    return [
        f"{first} + {first + step} + {first + 2 * step} + ... + {last}",
        f"  terms: ({last} - {first}) / {step} + 1 = {n}",
        f"  sum: {n} * ({first} + {last}) / 2 = {n * (first + last) // 2}",
    ]


def _story(rng: Random) -> list[str]:
    """A word problem about buying, sharing or travelling, solved."""
    who, noun, town = rng.choice(words.GIVEN), rng.choice(words.NOUNS), words.city(rng)
    n, price, other = rng.randrange(3, 48), rng.randrange(2, 95), rng.randrange(2, 60)
    bill = n * price + other
    paid = (bill // 50 + 1) * 50
    speed, hours = rng.randrange(12, 130), rng.randrange(2, 9)
    share = rng.randrange(3, 12)
    stories = (
        [
            f"{who} buys {n} {noun}s in {town} at {price} each, delivery {other}, and gives {paid}. Change?",
            f"  goods: {n} * {price} = {n * price}",
            f"  with delivery: {n * price} + {other} = {bill}",
            f"  change: {paid} - {bill} = {paid - bill}",
        ],
        [
            f"{who} drives to {town} at {speed} km/h for {hours} h, then {other} km more. How far in all?",
            f"  {speed} * {hours} = {speed * hours}",
            f"  {speed * hours} + {other} = {speed * hours + other}",
            f"Answer: {speed * hours + other} km.",
        ],
        [
            f"{share} people share {n * price} {noun}s evenly. How many has {who}, how many are left?",
            f"  {n * price} = {n * price // share} * {share} + {n * price % share}",
            f"Answer: {n * price // share} each, {n * price % share} left over.",
        ],
    )
    return rng.choice(stories)


def _percent(rng: Random) -> list[str]:
    """A rise and a fall by percentages, in exact fractions of the start."""
    start, up, down = rng.randrange(2, 200) * 100, rng.randrange(1, 60), rng.randrange(1, 60)
    risen = start + start // 100 * up
    fallen = Fraction(risen * (100 - down), 100)
    return [
        f"{start} rises by {up} %, then falls by {down} %.",
        f"  {start} * {100 + up}/100 = {risen}",
        f"  {risen} * {100 - down}/100 = {fallen}",
    ]


EXERCISES: tuple[Callable[[Random], list[str]], ...] = (
    _addition,
    _multiplication,
    _division,
    _fractions,
    _euclid,
    _factors,
    _equation,
    _brackets,
    _base,
    _power,
    _statistics,
    _series,
    _story,
    _percent,
)


def document(rng: Random) -> str:
    """A sheet of worked exercises: mixed, or several of one kind."""
    kinds = EXERCISES if rng.random() < 0.6 else (rng.choice(EXERCISES),)
    exercises = ["\n".join(rng.choice(kinds)(rng)) for _ in range(rng.randrange(4, 9))]
    return ("\n\n".join(exercises) + "\n").replace("*", rng.choice(TIMES))
