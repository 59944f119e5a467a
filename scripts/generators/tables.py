"""CSV as it is met in the wild: several delimiters, quoting rules, line ends and decimal signs."""

import csv
import io
from collections.abc import Callable
from datetime import date, timedelta
from random import Random

from scripts.generators import words

Column = tuple[tuple[str, ...], Callable[[Random, int], str]]

# Each column: the headings it is met under, and how to make the cell of a row from its number.
COLUMNS: tuple[Column, ...] = (
    (("id", "ID", "record_id", "Nr."), lambda rng, row: str(1000 + row)),
    (("name", "Name", "full_name", "contact"), lambda rng, row: words.name(rng)),
    (("email", "E-mail", "mail_address"), lambda rng, row: words.email(rng)),
    (("city", "Ort", "ville", "location"), lambda rng, row: words.city(rng)),
    (
        ("address", "ship_to"),
        lambda rng, row: f"{rng.randrange(1, 300)} {rng.choice(words.STREETS)} Road, {words.city(rng)}",
    ),
    (("product", "item", "description"), lambda rng, row: words.thing(rng)),
    (("sku", "code", "Artikelnummer"), lambda rng, row: words.slug(rng)),
    (("qty", "quantity", "units"), lambda rng, row: str(rng.randrange(1, 250))),
    (("price", "amount", "betrag", "total"), lambda rng, row: words.money(rng)),
    (("currency", "cur"), lambda rng, row: rng.choice(words.CURRENCIES)),
    (("discount", "rate"), lambda rng, row: f"{rng.randrange(0, 45)}%"),
    (("status", "state"), lambda rng, row: rng.choice(words.STATES)),
    (("comment", "note", "Bemerkung", "remarks"), lambda rng, row: words.note(rng)),
    (("dimensions", "size"), lambda rng, row: f'{rng.randrange(1, 40)}" x {rng.randrange(1, 40)}"'),
    (("checked", "is_valid"), lambda rng, row: rng.choice(("true", "false", "TRUE", "yes", "n/a"))),
    (("updated_at", "timestamp"), lambda rng, row: words.moment(rng).strftime("%Y-%m-%dT%H:%M:%SZ")),
    (("due", "date", "day"), lambda rng, row: words.moment(rng).strftime("%d/%m/%Y")),
    (("uuid", "key"), lambda rng, row: words.uuid(rng)),
    (("ip", "client"), lambda rng, row: words.address(rng)),
    (("unit", "uom"), lambda rng, row: rng.choice(words.UNITS)),
)

LEDGER = (
    ("Date", "Booking date", "Buchungstag", "Fecha", "date"),
    ("Payee", "Counterparty", "Auftraggeber", "Beneficiario", "to_from"),
    ("Reference", "Details", "Verwendungszweck", "Concepto", "memo"),
    ("Debit", "Paid out", "Soll", "Cargo", "debit"),
    ("Credit", "Paid in", "Haben", "Abono", "credit"),
    ("Balance", "Running balance", "Kontostand", "Saldo", "balance"),
)


def _write(rng: Random, table: list[list[str]]) -> str:
    """The table under a random dialect of delimiter, quoting and line end."""
    out = io.StringIO()
    csv.writer(
        out,
        delimiter=rng.choice(",,,;;\t|"),
        quoting=rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_MINIMAL, csv.QUOTE_ALL)),
        lineterminator=rng.choice(("\n", "\n", "\r\n")),
    ).writerows(table)
    return out.getvalue()


def _records(rng: Random) -> str:
    """A table of unrelated columns; a few cells are missing, a few hold a line break."""
    columns = rng.sample(COLUMNS, rng.randrange(4, 10))
    table = [[rng.choice(headings) for headings, _ in columns]]
    for row in range(rng.randrange(6, 24)):
        cells = [make(rng, row) for _, make in columns]
        for i in range(len(cells)):
            luck = rng.random()
            if luck < 0.04:
                cells[i] = rng.choice(("", "", "NULL", "-"))
            elif luck < 0.05:
                cells[i] += "\n" + words.note(rng)
        table.append(cells)
    return _write(rng, table)


def _measurements(rng: Random) -> str:
    """A series from sensors at even steps: each value strays a little from the one before."""
    sensors = rng.sample(words.NOUNS, rng.randrange(2, 6))
    heads = [f"{sensor}_{rng.choice(words.UNITS)}" for sensor in sensors]
    values = [rng.randrange(-500, 9_000) for _ in sensors]
    step, moment = timedelta(seconds=rng.choice((1, 10, 60, 300, 3600))), words.moment(rng)
    comma = rng.random() < 0.25
    table = [["time", *heads]]
    for _ in range(rng.randrange(10, 30)):
        values = [value + rng.randrange(-40, 41) for value in values]
        cells = [f"{value / 100:.2f}" for value in values]
        table.append(
            [moment.strftime("%Y-%m-%d %H:%M:%S"), *(c.replace(".", ",") if comma else c for c in cells)]
        )
        moment += step
    return _write(rng, table)


def _ledger(rng: Random) -> str:
    """A bank statement whose balance column adds up."""
    balance, day = rng.randrange(-20_000, 900_000), words.moment(rng).date()
    table = [[rng.choice(headings) for headings in LEDGER]]
    for _ in range(rng.randrange(8, 22)):
        cents = rng.randrange(-60_000, 60_000)
        balance += cents
        amount = f"{abs(cents) / 100:,.2f}"
        debit, credit = (amount, "") if cents < 0 else ("", amount)
        table.append(
            [day.isoformat(), words.name(rng), words.note(rng), debit, credit, f"{balance / 100:,.2f}"]
        )
        day += timedelta(days=rng.randrange(4))
    return _write(rng, table)


def _pivot(rng: Random) -> str:
    """Towns by months, with the sum of every row and of every column."""
    first = date(rng.randrange(2009, 2029), rng.choice((1, 4, 7, 10)), 1)
    months = [first.replace(month=first.month + i).strftime("%Y-%m") for i in range(3)]
    towns = sorted({words.city(rng) for _ in range(rng.randrange(4, 12))})
    counts = [[rng.randrange(20_000) for _ in months] for _ in towns]
    table = [[f"{rng.choice(words.NOUNS)}s {rng.choice(words.VERBS)}", *months, "sum"]]
    table += [[town, *map(str, row), str(sum(row))] for town, row in zip(towns, counts, strict=True)]
    columns = [sum(column) for column in zip(*counts, strict=True)]
    return _write(rng, [*table, ["sum", *map(str, columns), str(sum(columns))]])


def document(rng: Random) -> str:
    """One table, with a header, as CSV text."""
    return rng.choice((_records, _records, _measurements, _ledger, _pivot))(rng)
