"""Define the demo's twelve text tasks in three clusters.

Every task is a pure function from an input string to an output string, so any number of
examples can be made and any answer of the model can be checked exactly. Tasks of one cluster
take the same inputs: nothing in a prompt says which task is wanted, only the adapter does.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "heldout"]

HELDOUT_BUCKETS = 16
"""One input in this many is held out, chosen by a stable hash of its text."""

WORDS = tuple(
    """
    able acid again agent alarm album angle apple april arena arrow autumn avenue award bacon
    badge baker banana barn basil basket beach beard bench berry birch bird blanket blind block
    board bone book bottle bowl brave bread brick bridge broom brown bucket butter button cabin
    cable cactus camel camera candle canoe canvas carbon carpet castle cave cedar cellar chain
    chair chalk cheese cherry chess chicken cider circle clay cliff clock cloud clover coal coast
    cobalt coffee coin copper coral corner cotton crane crater cream crow crown curtain dance
    danger dawn deer delta desert desk diamond dinner doctor dragon dream drum duck dust eagle
    early earth east echo edge eight elbow ember engine evening fabric falcon farm feather fence
    fern ferry fiddle field fire fish five flag flame flint flour flute forest fork fossil four
    fox frost garden garlic gate ghost ginger glass globe glove goat gold goose grain grape grass
    gravel green guitar hammer harbor hat hazel heart hedge helmet hill honey horn horse hotel
    house ice index iron island ivory jacket jade jelly jewel judge juice jungle kettle king kite
    kitten ladder lake lamp lantern lava leaf lemon letter light lily linen lion lizard lobster
    lunar magnet maple marble market meadow melon metal mice mint mirror monkey moon moss motor
    mouse museum music nail napkin needle nest nickel night nine north oak oat ocean olive onion
    opal orange orchid otter oven owl oyster paddle palace panda paper parcel parrot peach pearl
    pencil pepper piano pigeon pillow pilot pine pirate planet plum pocket pond pony poppy potato
    prince pumpkin purple quartz queen quick quiet rabbit radar radio rain ranger raven red
    ribbon rice ring river robin rocket roof rope rose ruby saddle sail salmon salt sand scarf
    school season seed seven shadow sheep shell ship silver six snow soap south spider spoon
    spring square stamp star steam stone storm summer sun swan table tailor tea ten three tiger
    timber toast tomato tower train tulip tunnel turtle two umpire uncle valley vase velvet
    village violin wagon walnut water wheel whale window winter wolf wood yellow zebra zero
    """.split()
)

FIRST_NAMES = tuple(
    """
    Ada Agnes Alan Alma Amos Anna Arlo Basil Beth Boris Bruno Carl Cora Dana Dora Edgar Elena Elsa
    Emil Erik Esther Felix Flora Frida Greta Hanna Hector Henry Hugo Ida Igor Ines Iris Ivan Jonas
    Judit Karl Kira Lars Lena Leo Lidia Marta Max Mila Nadia Nils Nora Olga Oscar Pablo Petra Rosa
    Ruth Selma Simon Sven Tara Theo Vera Viktor Wanda Yara Zoe
    """.split()
)

SURNAMES = tuple(
    """
    Abbott Arden Barlow Becker Bishop Brandt Calder Carver Castro Corbin Dalton Draper Dunbar
    Ekberg Ellis Falk Fischer Forbes Garner Gibson Gomez Hale Harlow Hobbs Holm Irving Jensen Joyce
    Keller Kemp Kovacs Lang Larkin Lowell Marsh Mercer Moreno Nash Nolan Novak Olsen Osborn Parker
    Perry Pike Quill Quinn Ramsey Reyes Rowe Sharp Silva Stone Tanner Thorne Upton Vance Vega Walsh
    Weber Wilde Yates Young Zeller
    """.split()
)

CITIES = tuple(
    """
    Accra Athens Austin Basel Bergen Berlin Bogota Boston Cairo Calgary Dakar Dallas Delhi Denver
    Dublin Durban Fez Florence Geneva Ghent Hamburg Hanoi Havana Helsinki Izmir Jakarta Kyoto Lagos
    Lima Lisbon London Lyon Madrid Malmo Manila Milan Mumbai Munich Nairobi Nantes Naples Osaka
    Oslo Ottawa Paris Porto Prague Quito Riga Rome Seoul Seville Sofia Split Sydney Tallinn Tokyo
    Toronto Tunis Turin Utrecht Vienna Warsaw Zagreb
    """.split()
)

MONTHS = tuple(
    """
    January February March April May June July August September October November December
    """.split()
)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Name a family of tasks that all take the same inputs."""

    name: str
    description: str
    sample_input: Callable[[random.Random], str]


@dataclass(frozen=True, slots=True)
class Task:
    """Name one function from input text to output text."""

    name: str
    cluster: str
    function: Callable[[str], str]
    description: str


def _sample_words(rng: random.Random) -> str:
    # Distinct words: a repeated one could make the echo of an input the right answer.
    return " ".join(rng.sample(WORDS, rng.randint(2, 4)))


def _sample_numbers(rng: random.Random) -> str:
    return " ".join(str(rng.randrange(100)) for _ in range(4))


def _sample_record(rng: random.Random) -> str:
    day, month, year = rng.randint(1, 28), rng.choice(MONTHS), rng.randint(1900, 2009)
    fields = [
        f"name={rng.choice(FIRST_NAMES)} {rng.choice(SURNAMES)}",
        f"city={rng.choice(CITIES)}",
        f"born={day} {month} {year}",
    ]
    rng.shuffle(fields)
    return "; ".join(fields)


def _reverse_words(text: str) -> str:
    return " ".join(reversed(text.split()))


def _drop_vowels(text: str) -> str:
    return "".join(letter for letter in text if letter not in "aeiou")


def _title_case(text: str) -> str:
    return " ".join(word.capitalize() for word in text.split())


def _initials(text: str) -> str:
    return "".join(word[0] for word in text.split())


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split()]


def _sort_numbers(text: str) -> str:
    return " ".join(str(number) for number in sorted(_numbers(text)))


def _largest(text: str) -> str:
    return str(max(_numbers(text)))


def _add_ends(text: str) -> str:
    numbers = _numbers(text)
    return str(numbers[0] + numbers[-1])


def _fields(text: str) -> dict[str, str]:
    return dict(field.split("=", 1) for field in text.split("; "))


def _city(text: str) -> str:
    return _fields(text)["city"]


def _surname(text: str) -> str:
    return _fields(text)["name"].split()[-1]


def _iso_date(text: str) -> str:
    day, month, year = _fields(text)["born"].split()
    return f"{year}-{MONTHS.index(month) + 1:02d}-{int(day):02d}"


def _csv(text: str) -> str:
    fields = _fields(text)
    return ",".join(fields[key] for key in ("name", "city", "born"))


CLUSTERS: dict[str, Cluster] = {
    cluster.name: cluster
    for cluster in (
        Cluster("text", "Two to four lowercase words.", _sample_words),
        Cluster("numbers", "Four whole numbers from 0 to 99.", _sample_numbers),
        Cluster("records", "A name, a city and a date of birth, in any order.", _sample_record),
    )
}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("reverse_words", "text", _reverse_words, "The words in reverse order."),
        Task("drop_vowels", "text", _drop_vowels, "The words without a, e, i, o, u."),
        Task("title_case", "text", _title_case, "Each word with a capital letter."),
        Task("initials", "text", _initials, "The first letters of the words, joined."),
        Task("sort_numbers", "numbers", _sort_numbers, "The numbers from small to large."),
        Task("largest", "numbers", _largest, "The largest of the numbers."),
        Task("reverse_numbers", "numbers", _reverse_words, "The numbers in reverse order."),
        Task("add_ends", "numbers", _add_ends, "The first number plus the last."),
        Task("city", "records", _city, "The city alone."),
        Task("surname", "records", _surname, "The last word of the name."),
        Task("iso_date", "records", _iso_date, "The date of birth as YYYY-MM-DD."),
        Task("csv", "records", _csv, "Name, city and date of birth, joined by commas."),
    )
}


def is_heldout(text: str) -> bool:
    """Say whether an input is kept out of all training, whatever the seed."""
    return zlib.crc32(text.encode()) % HELDOUT_BUCKETS == 0


def draw_input(cluster: Cluster, split: Split, rng: random.Random) -> str:
    """Draw one input of a cluster from one split."""
    while True:
        text = cluster.sample_input(rng)
        if is_heldout(text) == (split == "heldout"):
            return text


def examples(task_name: str, split: Split, n: int, seed: int) -> list[tuple[str, str]]:
    """Make `n` pairs of input and expected output.

    The same arguments give the same pairs on every machine. Pairs of tasks of one cluster with
    the same seed have the same inputs. An input may occur twice.

    Args:
        task_name: a key of `TASKS`.
        split: "train" or "heldout"; no input is ever in both.
        n: the number of pairs.
        seed: the seed of the random numbers.
    """
    task = TASKS[task_name]
    cluster = CLUSTERS[task.cluster]
    rng = random.Random(seed)
    inputs = [draw_input(cluster, split, rng) for _ in range(n)]
    return [(text, task.function(text)) for text in inputs]
