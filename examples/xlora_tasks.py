"""Three small tasks with generated data, plainly different from each other: JSON records, SQL queries, ISO dates.

Each completion holds something that its prompt does not say (an id, a limit, a time of day), as real answers do: the
best possible loss is not 0, and losses can be compared in percent.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

NAMES = ("Ada", "Ben", "Carla", "Dmitri", "Elif", "Femi", "Greta", "Hiro", "Ines", "Jonas", "Kavya", "Leo")
FAMILIES = ("Brown", "Costa", "Diaz", "Eriksen", "Fischer", "Grant", "Haddad", "Ito", "Jansen", "Kowalski")
JOBS = ("baker", "nurse", "pilot", "teacher", "plumber", "lawyer", "farmer", "editor", "chemist", "driver")
CITIES = ("Lyon", "Oslo", "Quito", "Kyoto", "Lagos", "Perth", "Turin", "Porto", "Cairo", "Leeds")
TABLES = {
    "products": ("name", "price", "stock", "weight"),
    "orders": ("id", "total", "discount", "customer"),
    "employees": ("name", "salary", "age", "office"),
    "flights": ("code", "distance", "delay", "origin"),
}
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip


@dataclass(frozen=True)
class Example:
    prompt: str
    completion: str
    task: str = ""
    """Of the completion."""


def json_record(choose: random.Random) -> Example:
    name = f"{choose.choice(NAMES)} {choose.choice(FAMILIES)}"
    age, job, city = choose.randint(18, 80), choose.choice(JOBS), choose.choice(CITIES)
    sentence = choose.choice(
        (
            f"{name} is a {job} from {city}, {age} years old.",
            f"At {age}, {name} works as a {job} in {city}.",
            f"In {city} lives {name}, {age}, a {job}.",
        )
    )
    record = {"id": f"{choose.randrange(16**4):04x}", "name": name, "age": age, "job": job, "city": city}
    return Example(f"Record: {sentence}\n", json.dumps(record) + "\n")


def sql_query(choose: random.Random) -> Example:
    table = choose.choice(tuple(TABLES))
    shown, tested = choose.sample(TABLES[table], 2)
    number, (words, sign) = choose.randint(1, 500), choose.choice((("above", ">"), ("below", "<"), ("equal to", "=")))
    question = choose.choice(
        (
            f"Which {shown} of {table} have {tested} {words} {number}?",
            f"List {shown} of {table} with {tested} {words} {number}.",
        )
    )
    order = choose.choice(("", f" ORDER BY {shown}"))
    if order:
        question += f" Sort by {shown}."
    limit = choose.randint(10, 99)
    query = f"SELECT {shown} FROM {table} WHERE {tested} {sign} {number}{order} LIMIT {limit};"
    return Example(f"Question: {question}\n", query + "\n")


def iso_date(choose: random.Random) -> Example:
    day, month, year = choose.randint(1, 28), choose.randint(1, 12), choose.randint(1900, 2030)
    ending = {1: "st", 2: "nd", 3: "rd"}.get(day % 10 if day not in (11, 12, 13) else 0, "th")
    text = choose.choice(
        (
            f"{MONTHS[month - 1]} {day}, {year}",
            f"the {day}{ending} of {MONTHS[month - 1]} {year}",
            f"{day} {MONTHS[month - 1]} {year}",
        )
    )
    time = f"{choose.randrange(24):02}:{choose.randrange(60):02}"
    return Example(f"Date: {text}\n", f"{year}-{month:02}-{day:02}T{time}\n")


TASKS: dict[str, Callable[[random.Random], Example]] = {"json": json_record, "sql": sql_query, "dates": iso_date}


def examples(task: str, count: int, seed: int) -> list[Example]:
    """``count`` examples of a task. Equal seeds give equal examples."""
    choose = random.Random(f"{task} {seed}")
    return [replace(TASKS[task](choose), task=task) for _ in range(count)]


def mixture(count: int, seed: int) -> list[Example]:
    """Examples of all tasks by turns, each made of two tasks one after another."""
    names = list(TASKS)
    pairs = [(names[index % 3], names[(index + 1 + index // 3 % 2) % 3]) for index in range(count)]
    choose = random.Random(f"mixture {seed}")
    found = []
    for first, second in pairs:
        before, after = TASKS[first](choose), TASKS[second](choose)
        found.append(Example(before.prompt + before.completion + after.prompt, after.completion, second))
    return found
