"""The one rule for every prompt that comes from outside: none may pair minors with sexual terms.

A prompt is read in several ways (`_views`): as it stands without accents and invisible characters, with look-alike letters and
digits read as the letters that they stand for, with spaced letters put together. The words are in `safety.toml`. No list is
complete, and no list understands a sentence: this keeps words out of prompts and is no judge of images.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from importlib.resources import files
from itertools import pairwise
from typing import Any, NamedTuple

from confusable_homoglyphs.confusables import confusables_data

from erasekit.errors import UsageError

ADULT = 18
# Marks of Indian scripts are part of their words, and no `\w`; their full stop is not.
W = r"(?:[^\W_]|[\u0900-\u0963\u0966-\u0dff])"
NOT_W = r"(?:_|(?![\u0900-\u0963\u0966-\u0dff])\W)"
CJK = r"[\u3040-\u30ff\u3400-\u9fff]"
CHINESE = "零一二三四五六七八九〇两十"
NUMERALS = {c: i for i, c in enumerate(CHINESE[:10])} | {"两": 2, "十": 10}
LEET = {"0": "o", "3": "e", "4": "a", "5": "s", "7": "t", "8": "b", "9": "g", "@": "a", "$": "s", "€": "e", "+": "t", "!": "i"}
# What the table of look-alikes leaves out, since no font draws it the same: letters that are read for one another all the same.
ALIKE = dict(zip("кĸκтτдипмнвьησυχя®©", "kkkttdnnmhbbnouxrrc", strict=True))
FILLERS = "the|and|with|very|your|little|young|small|cute|old|year|years|photo|picture|image|pics?|art"


class Words(NamedTuple):
    """The terms of one kind.

    Attributes:
        whole: words.
        stems: beginnings of words, by their length.
        phrases: finds terms of several words, with any separator between them or none.
        inside: finds terms of scripts that do not separate words, and signs.
        joined: finds an English word within another.
    """

    whole: frozenset[str]
    stems: dict[int, frozenset[str]]
    phrases: re.Pattern[str]
    inside: re.Pattern[str]
    joined: re.Pattern[str]


class Ages(NamedTuple):
    """How one language says ages: what each number is called, what multiplies ten, and what stands around them."""

    numbers: dict[tuple[str, ...], int]
    tens: frozenset[str]
    after: frozenset[tuple[str, ...]]
    before: frozenset[tuple[str, ...]]
    under: frozenset[tuple[str, ...]]


def is_sexual(prompts: Iterable[str]) -> bool:
    """Whether one of the prompts has a sexual term."""
    return any(_has(view, "sexual") for prompt in prompts for view in _views(prompt))


@lru_cache(maxsize=100_000)
def is_unsafe(prompt: str) -> bool:
    """Whether a prompt pairs minors with sexual terms."""
    views = _views(prompt)
    if not any(_has(view, "sexual") for view in views):
        return False
    return any(_has(view, "minor") or _has_age(view) for view in views)


def reject_unsafe(prompts: Iterable[str]) -> None:
    """Refuse prompts that pair minors with sexual terms; every loader of prompts calls this, and every encoder.

    Raises:
        UsageError: says which prompt, by its position.
    """
    for i, prompt in enumerate(prompts):
        if is_unsafe(prompt):
            raise UsageError(f"Prompt {i + 1} pairs minors with sexual terms, which erasekit refuses to draw. Remove it.")


def _plain(text: str) -> str:
    """Compatibility forms, accents, case and invisible characters taken away; digits of all scripts are ours."""
    if text.isascii():
        return text.casefold()
    kept: list[str] = []
    for c in unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text)):
        kind = unicodedata.category(c)
        hidden = kind in ("Cf", "Cc", "Co", "Cn") and c not in "\n\t"
        accent = kind == "Mn" and not "\u0900" <= c <= "\u0dff"
        if c == "\u0303" and kept[-1:] in (["n"], ["N"]):  # "niña" is no name, "Nina" is one
            kept[-1] = "ñ"
        elif not hidden and not accent:
            kept.append(str(unicodedata.decimal(c)) if kind == "Nd" else c)
    return "".join(kept).casefold()


@cache
def _alike() -> dict[int, str]:
    """The letter from a to z that each character looks like: by Unicode's table, else by its name."""
    found = {}
    for character, others in confusables_data.items():
        like = next((o["c"].casefold() for o in others if re.fullmatch("[A-Za-z]", o["c"])), "")
        if like and len(character) == 1 and not character.isascii():
            found[ord(character)] = like
    letter = re.compile(r".*\bLETTER (?:SMALL CAPITAL )?([A-Z])(?: WITH .*)?")
    for code in (*range(0x80, 0x2000), *range(0x24B6, 0x24EA), *range(0xA720, 0xA800), *range(0x1F100, 0x1F200)):
        if code not in found and (name := letter.fullmatch(unicodedata.name(chr(code), ""))):
            found[code] = name[1].lower()
    return found | {ord(character): like for character, like in ALIKE.items()}


def _views(prompt: str) -> list[str]:
    """The ways in which a prompt can be read."""
    plain = _plain(prompt)
    views = [plain]
    if not prompt.isascii():
        views += [_plain(prompt.translate(_alike())), re.sub(rf"(?<={CJK}){NOT_W}+(?={CJK})", "", plain)]
    views += [_unspaced(view) for view in views[:2]]
    for one, two in (("i", "00"), ("l", "00"), ("i", "u")):  # "1" stands for two letters, and "00" for an u too ("n00d")
        table = str.maketrans(LEET | {"1": one, "|": one})
        views += [_translated(view.replace("00", two), table) for view in list(views)]
    for view in list(dict.fromkeys(views)):
        if re.search(r"([^\W\d_])\1\1", view):
            views += [re.sub(r"([^\W\d_])\1{2,}", kept, view) for kept in (r"\1", r"\1\1")]
    return list(dict.fromkeys(views))


def _translated(text: str, table: dict[int, str]) -> str:
    """A text with its digits and signs read as letters, where they stand together with letters."""
    return re.sub(r"\S+", lambda found: found[0].translate(table) if re.search("[a-z]", found[0]) else found[0], text)


def _unspaced(text: str) -> str:
    """Letters that stand alone, one after the other, put together; with one more letter or digit they are still a word."""
    return re.sub(rf"(?<!{W})(?:{W}{NOT_W}{{1,3}}){{2,}}{W}(?!{W})", lambda found: re.sub(NOT_W, "", found[0]), text)


def _has(view: str, kind: str) -> bool:
    """Whether a reading has a term of a kind (`minor` or `sexual`)."""
    words = _words()[kind]
    if words.inside.search(_without(view)) or words.phrases.search(view):
        return True
    tokens = re.findall(f"{W}+", view)
    if any(_is(form, words) for token in tokens for form in _forms(token)):
        return True
    if any(len(a + b) > 4 and _is(a + b, words) for a, b in pairwise(tokens)):
        return True
    return any(_joined(token, kind) for token in tokens if 5 < len(token) < 40)


def _is(token: str, words: Words) -> bool:
    return token in words.whole or any(token[:n] in stems for n, stems in words.stems.items())


def _forms(token: str) -> Iterator[str]:
    """A token, and without Arabic's articles and prepositions, which are written together with their word."""
    yield token
    if "\u0600" <= token[0] <= "\u06ff":
        bare = re.sub("^[وف]?[بكل]?(?:ال|لل)?", "", token)
        yield bare


@lru_cache(maxsize=10_000)
def _joined(token: str, kind: str) -> bool:
    """Whether a token is several words of the lists put together ("littlegirl"), or holds one of both kinds."""
    lists = _words()
    if not lists[kind].joined.search(token):
        return False
    if all(lists[k].joined.search(token) for k in lists):
        return True
    known = "|".join((*(words.joined.pattern for words in lists.values()), FILLERS))
    return re.fullmatch(f"(?:{known})+s?", token) is not None


def _without(view: str) -> str:
    """A reading without the words of Chinese and Japanese that hold a term and mean another thing."""
    return _harmless().sub(" ", view)


def _has_age(view: str) -> bool:
    """Whether a reading tells an age under eighteen."""
    if any(10 <= int(found) < ADULT for found in re.findall(r"(?<![\d.])(\d\d)f(?!\w)", view)):  # "15f"
        return True
    if any(int(found) < ADULT for found in re.findall(r"(?<![\d.])(\d{1,2})y(?:o|rs?)?(?!\w)", view)):
        return True
    for number in re.findall(rf"([\d{CHINESE}]+)\s*(?:岁|歲|歳|才|周岁|个月|か月|ヶ月)", view):
        if _numeral(number) < ADULT:
            return True
    for first, second in re.findall(
        r"(?:[未不]满|[未不]滿)\s*(\d+|[一二三四五六七八九十]+)|(\d+)\s*[歳才岁]?\s*(?:未満|以下)", view
    ):
        if _numeral(first or second) <= ADULT:
            return True
    view = re.sub(r"(years?|yrs?|months?)(?=olds?(?!\w))", r" \1 ", view)  # "twelveyearold"
    view = re.sub(r"(\d)\s*[-\u2013\u2014/]\s*(\d)", r"\1 to \2", view)
    tokens = re.findall(rf"\d+|(?:(?!\d){W})+|<", view)
    return any(_tells(tokens, i, ages) for ages in _ages() for i in range(len(tokens)))


def _tells(tokens: list[str], start: int, ages: Ages) -> bool:
    """Whether the number that begins at a token is an age under eighteen."""
    number, end = _number(tokens, start, ages)
    if number is None or number > ADULT:
        return False
    before = {tuple(tokens[start - n : start]) for n in (1, 2, 3) if n <= start}
    if number >= 10 and (before & ages.under or ("<",) in before):
        return True
    ends = [end]
    if tokens[end : end + 1] and tokens[end] in ("to", "or", "and") and end + 1 < len(tokens):  # "16 to 18 years old"
        ends.append(_number(tokens, end + 1, ages)[1])
    after = {tuple(tokens[e : e + n]) for e in ends for n in (1, 2, 3)}
    return number < ADULT and bool(after & ages.after or before & ages.before)


def _number(tokens: list[str], start: int, ages: Ages) -> tuple[int | None, int]:
    """The number that begins at a token, and where it ends; None in the midst of a larger one ("twenty one")."""
    if tokens[start].isdigit():
        return int(tokens[start][:4]), start + 1
    size = next((n for n in (2, 1) if tuple(tokens[start : start + n]) in ages.numbers), 0)
    earlier, later = tokens[max(0, start - 2) : start], tokens[start + size : start + size + 1]
    tens = {*earlier[-1:], *later} | ({earlier[0]} if len(earlier) == 2 and len(earlier[1]) < 4 else set())  # "veinte y dos"
    if not size or tens & ages.tens or tuple(tokens[start - 1 : start + 1]) in ages.numbers:
        return None, start
    return ages.numbers[tuple(tokens[start : start + size])], start + size


def _numeral(text: str) -> int:
    """A number in digits or in Chinese numerals up to 99."""
    if text.isdigit() and text.isascii():
        return int(text[:4])
    tens, has_ten, ones = text.partition("十")
    if not has_ten:
        return int("".join(str(NUMERALS.get(c, c)) for c in text)[:4])
    return 10 * (NUMERALS.get(tens[-1:], 1) if tens else 1) + (NUMERALS.get(ones[:1], 0) if ones else 0)


@cache
def _content() -> dict[str, Any]:
    return tomllib.loads(files("erasekit").joinpath("safety.toml").read_text("utf-8"))


@cache
def _words() -> dict[str, Words]:
    content = _content()
    return {
        kind: _compiled([*content[kind].values(), *content["both"].values()], content[kind]["en"].split())
        for kind in ("minor", "sexual")
    }


@cache
def _harmless() -> re.Pattern[str]:
    return _any(_plain(word) for text in _content()["harmless"].values() for word in text.split())


def _compiled(lists: Iterable[str], english: Iterable[str]) -> Words:
    terms = dict.fromkeys(_plain(term) for text in lists for term in text.split())
    spaced = [t for t in terms if "_" in t]
    inside = [t for t in terms if re.match(rf"{CJK}|{NOT_W}", t)]
    single = [t for t in terms if t not in spaced and t not in inside]
    stems = [t[:-1] for t in single if t.endswith("*")]
    gap = NOT_W + "*"
    phrases = [gap.join(map(re.escape, t.rstrip("*").split("_"))) + ("" if t.endswith("*") else rf"(?!{W})") for t in spaced]
    return Words(
        whole=frozenset(t for t in single if not t.endswith("*")),
        stems={n: frozenset(s for s in stems if len(s) == n) for n in sorted({len(s) for s in stems})},
        phrases=re.compile(rf"(?<!{W})(?:{'|'.join(phrases)})"),
        inside=_any(inside),
        joined=_any(
            t.rstrip("*") for t in english if t.isascii() and (len(t) > 3 or t in ("sex", "kid", "boy")) and "_" not in t
        ),
    )


def _any(terms: Iterable[str]) -> re.Pattern[str]:
    """Finds any of some terms, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(terms, key=len, reverse=True))))


@cache
def _ages() -> list[Ages]:
    def sequences(text: str) -> frozenset[tuple[str, ...]]:
        return frozenset(tuple(_plain(term).split("_")) for term in text.split())

    return [
        Ages(
            numbers={
                tuple(_plain(name).split("_")): value
                for value, names in enumerate(language["numbers"].split())
                for name in names.split("|")
            },
            tens=frozenset(map(_plain, language["tens"].split())),
            after=sequences(language["after"]),
            before=sequences(language["before"]),
            under=sequences(language["under"]),
        )
        for language in _content()["age"].values()
    ]
