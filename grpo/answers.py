"""What a written answer means: whether two of them say the same, as a careful human would read them.

`same(gold, answer, verify)` brings both texts to one spelling (the rules and words are in spellings.txt), takes lists,
sets, intervals and matrices apart, and compares dates, quantities with their units, multiple choice letters and words
by itself, exactly. What is left is mathematics for `verify(gold, answer)`: math-verify in a guarded process, see
`math_judge`. Where a human would hesitate the answer is wrong, because a reward for hedging teaches hedging.
"""
import math
import re
from datetime import datetime
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from operator import eq
from pathlib import Path

from dateutil import parser as dates

DEEPEST = 20  # brackets within brackets
TABLES = {  # of spellings.txt: {heading: its lines, as what is written and what it becomes}
    heading: [[part.strip('"') for part in line.split("   # ")[0].split(" → ")] for line in lines if line]
    for block in Path(__file__).with_name("spellings.txt").read_text(encoding="utf-8").split("\n== ")[1:]
    for heading, *lines in [[block.partition(":")[0], *block.splitlines()[1:]]]}
SYMBOLS = {written: spelling for all_written, spelling in TABLES["symbols"] for written in all_written.split()}
SYMBOLS |= {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F) if not chr(code).isdigit()}  # "：" -> ":"
SYMBOL = re.compile(rf"\\([A-Za-z]+|[^A-Za-z])|{'|'.join(re.findall('[一-鿿]{2,}', ' '.join(SYMBOLS)))}|[^\x00-\x7f]")
FIRST, REWRITES, NUMERALS = ([(re.compile(pattern), replacement) for pattern, replacement in TABLES[heading]]
                             for heading in ("first", "rewrites", "numerals"))
UNITS = {word: spelling or word for all_written, spelling in TABLES["units"] for word in all_written.split()}
UNITS |= {spelling: spelling for spelling in UNITS.values()}
CURRENCIES = {"dollar", "euro", "pound", "yen", "cent"}
SCALES = {word: Fraction(value) for word, value in TABLES["scales"]}
HEDGE = re.compile(rf"(?i)\b(?:{'|'.join(line for line, in TABLES['hedges'])})\b|n't\b|\?|\\approx|\.\.|"
                   r"\d ?-?(?:squared|cubed|ish)\b|\d ?'")
FILLER = set(" ".join(line for line, in TABLES["filler"]).split())
ARTICLES = set("a an the is are and The An A".split())
SPELLED = {word: int(value) for word, value in TABLES["numbers"]}
SPELLED |= {f"{ten}-{one}": SPELLED[ten] + SPELLED[one] for ten in list(SPELLED)[20:] for one in list(SPELLED)[1:10]}
SPELLED_OUT = re.compile(rf"(?i)\b({'|'.join(reversed(SPELLED)).replace('-', '[- ]')})\b")
LEAD_IN = re.compile(r"(?i)(?!(?:s?he|they|we|you|i) (?:is|are) [a-z])(?:(?:so|thus|hence|therefore),? +)?"
                     rf"(?:{'|'.join(line for line, in TABLES['lead-ins'])})?")
CHINESE = "[\u4e00-\u9fff]"
MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array|cases)\}(?:\{[clr|]*\})?((?:.|\n)*?)\\end\{\1\}")
THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
PLAIN = re.compile(r"-?(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.[0-9]+)?")  # "-1,234.5"
UNIT_TAIL = re.compile(rf"(?i)(?:(?: per)?[ /]+(?:{'|'.join(unit for unit in UNITS if len(unit) > 1)})s?)+$")
ATOM = r"(?:\\[a-z]+|[A-Z]{2,}|[A-Za-z])'*(?:_(?:\w+|\{[^{}]*\}))?(?:\^\{?-1\}?)?"
QUANTITY = (r"(?:(?!\\(?:sqrt|ln|log|lg|exp)(?![a-z]))"
            rf"(?:\\[a-z]+ ?(?:\d |(?=\\|[\dA-Z]))?)?\{{?{ATOM}\}}? ?(?:{ATOM}|\([\w ,.+|\\-]*\))?"
            rf"|\|(?![a-z]\|)[A-Za-z \\{{}}]+\||\\frac ?\{{{ATOM}\}} ?\{{{ATOM}\}}|{CHINESE}+)")
NAME = re.compile(rf"\(?{QUANTITY}(?: ?[,:/] ?{QUANTITY}){{0,9}}\)?")  # "x", "f(1)", "|AB|", "\\cos A", "a:b", "(p,q)"
LETTER = re.compile(r"(?<![\\A-Za-z])(?<!\\begin\{)[A-Za-z]")  # of a variable, not of a command
SEPARATOR = r",? ?\band\b|,? ?\bor\b|;|\\cup\b|\bU\b"
RELATION = re.compile(r" ?(<|>|\\le\b|\\ge\b) ?")


def depths(text: str) -> list[int]:
    """How many brackets are open after each character."""
    return list(accumulate((letter in "({[") - (letter in ")}]") for letter in text))


def matrix(match) -> str:
    """A LaTeX matrix as rows in brackets, a single column as one vector."""
    rows = [row.split("&") for row in re.split(r"\\\\(?:\[\w+\])?", match[2]) if row.strip()]
    return "(" + ",".join(row[0] if max(map(len, rows)) == 1 else f"({','.join(row)})" for row in rows) + ")"


def rewrite(text: str, rules: list) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def symbol(match) -> str:
    r"""A LaTeX command or a character that is not ASCII as in spellings.txt; unknown ones as they are, "\%" as "%"."""
    return SYMBOLS.get(match[1] or match[0], match[0] if (match[1] or "a").isalpha() else match[1])


def thousands(match) -> str:
    """Without thousands commas: "2,304" -> "2304", but "(100,200)" is a list, "(1,000, 200)" and "(1,000)" none."""
    is_list = depths(match.string[: match.start()] or " ")[-1] > 0 and ", " not in match.string and ",0" not in match[0]
    return match[0] if is_list else match[0].replace(",", "")


@lru_cache(maxsize=10000)
def clean(text: str) -> str:
    """The text in one spelling, without decoration and lead-in; nothing, if no human would read it."""
    if PLAIN.fullmatch(text):  # most are, and the rules take their time
        return text.replace(",", "")
    if max(depths(text), default=0) > DEEPEST:
        return ""
    text = MATRIX.sub(matrix, text)
    text = rewrite(SYMBOL.sub(symbol, rewrite(text, FIRST)), REWRITES)
    if re.fullmatch(r"\[ ?\[.*\] ?\]", text):  # [[1,2],[3,4]]
        text = text.replace("[", "(").replace("]", ")")
    text = THOUSANDS.sub(thousands, text.strip(" *_`#:=").rstrip(".,; *_"))
    lead_in = LEAD_IN.match(text)
    if lead_in and not HEDGE.search(lead_in[0]):
        text = text[lead_in.end():]
    if re.search(r"(?![0-9])\d|@", text):  # digits of other scripts, which Python takes for numbers; our own mark
        return ""
    return " ".join(text.strip(" *_`#:=").rstrip(".,; *_").split())


def unit(word: str) -> str:
    """A unit in one spelling, any other word without its plural s."""
    word = word.lower()
    return UNITS.get(word) or UNITS.get(word.removesuffix("s"), word.removesuffix("s"))


def words(text: str) -> list[str]:
    found = re.findall(r"[\w']+|[-+*/^=<>%.()\[\]{}|!]", text.rstrip(".!"))
    return [unit(word) for word in found if word not in ARTICLES or word == found[-1]]


def is_prose(text: str) -> bool:
    """Whether it has words, not counting an "and" with something behind it."""
    return bool(re.search(rf"(?<![\\A-Za-z_{{])(?!and\b.)[A-Za-z']{{3}}|{CHINESE}", text))


# ------------------------------------------------------------------------------------------------- readings

DATE = re.compile(r"(?i)\d:\d\d|\d/\d+/\d|\d ?[ap]m\b|\d-\d\d?-\d|"
                  r"\b(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)")


def date(text: str) -> list | None:
    """A date or a time, read twice with other defaults, so that a missing part is no part that happens to agree."""
    if len(text) > 40 or not DATE.search(text):
        return None
    try:
        read = [dates.parse(text, default=datetime(2000 + n, n, n), ignoretz=True) for n in (1, 2)]
        return re.findall(r"\b[A-Z]{1,3}T\b|\bUTC\b", text) + read
    except (ValueError, OverflowError):
        return None


NUMBER = re.compile(r"(?P<sign>[-+]?) ?(?P<whole>\d*)(?:\.(?P<decimals>\d*)(?:~(?P<repeated>\d+))?)?"
                    r"(?:@(?P<exponent>[-+]?\d{1,3}))?"
                    r"(?: ?/ ?(?P<over>0*[1-9]\d*)| (?P<top>\d+) ?/ ?(?P<bottom>0*[1-9]\d*))? ?(?P<percent>%?)")


@lru_cache(maxsize=10000)
def quantity(text: str) -> tuple[Fraction, str, frozenset] | None:
    """One number, exactly: its value, "%" if it is a percentage, and the words beside it, units in one spelling."""
    if PLAIN.fullmatch(text):
        return Fraction(text), "", frozenset()
    based = re.fullmatch(r"([0-9A-Z]+)_(\w+)", text)
    if based:
        base = SPELLED.get(based[2].lower()) or int(based[2] if based[2].isdecimal() else 0)
        valid = 2 <= base <= 36 and all(int(digit, 36) < base for digit in based[1])
        return (Fraction(int(based[1], base)), "", frozenset([f"base {base}"])) if valid else None
    if HEDGE.search(text):
        return None
    text = SPELLED_OUT.sub(lambda match: str(SPELLED[match[0].lower().replace(" ", "-")]), text)
    text = rewrite(text, NUMERALS)
    number = NUMBER.fullmatch(" ".join(re.sub(r"[A-Za-z][A-Za-z']*", " ", text).split()))
    if not number or not (number["whole"] or number["decimals"] or number["repeated"]):
        return None
    decimals, repeated = number["decimals"] or "", number["repeated"] or "0"
    value = Fraction(f"{number['whole'] or 0}.{decimals or 0}e{number['exponent'] or 0}")
    value += Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(decimals))
    value = value / int(number["over"] or 1) + Fraction(int(number["top"] or 0), int(number["bottom"] or 1))
    units = set()
    for match in re.finditer(r"[A-Za-z][A-Za-z']*", text):
        word, is_before = match[0].lower(), not re.search(r"\d", text[: match.start()])
        if is_before and word not in FILLER and unit(word) not in CURRENCIES:  # "double 36", "almost 100"
            return None
        if len(word) == 1 and not is_before and (text[match.start() - 1].isdigit() or match[0] in "ainkcfl"):
            return None  # 5m and 5 n may be products
        if word.removesuffix("s") in SCALES:
            value *= SCALES[word.removesuffix("s")]
        elif len(word) <= 2 and unit(word) == word not in UNITS and word not in FILLER:  # a variable
            return None
        elif word not in FILLER:
            units.add(unit(word))
    return -value if number["sign"] == "-" else value, number["percent"], frozenset(units)


def same_quantity(gold: tuple, answer: tuple) -> bool:
    """Equal values, and no unit that contradicts another; a percentage may be written as a fraction, 50 % as 0.5."""
    (value, percent, units), (answered, answered_percent, answered_units) = gold, answer
    equal = value == answered
    if percent != answered_percent and any(word in UNITS for word in units | answered_units):
        return False
    if percent and not answered_percent:
        equal = answered in (value, value / 100)
    elif answered_percent and not percent:
        equal = answered / 100 == value or equal and abs(value) > 1
    return equal and same_units(units, answered_units)


def same_units(gold: frozenset, answer: frozenset) -> bool:
    """Whether no unit contradicts another: one side may name none, and may say more words than the other."""
    known = [{word for word in words if word in UNITS or "base" in word} for words in (gold, answer)]
    return ((known[0] == known[1] or not all(known) and "base" not in str(known))
            and max(len(gold - known[0]), len(answer - known[1])) <= 4
            and (gold - known[0] <= answer - known[1] or gold - known[0] >= answer - known[1]))


def choice(text: str) -> str | None:
    """The letter of a multiple choice answer: `B`, `(B)`, `B. 42`, `(B) 42`."""
    match = re.fullmatch(r"\(?([A-Ja-j])\)?(?:(?<=\))[ .:]*|[.:)] ?|$)(.*)", text)
    more = r"\([A-J]\)|\b[B-J]\b|\bA\b(?! ?[a-z])|^,|^(?:and|is)\b|\b(?:no|false)\b"  # another letter, or a verdict
    has_more = match and (HEDGE.search(match[2]) or re.search(more, match[2]))
    return match[1].upper() if match and not has_more else None


# ------------------------------------------------------------------------------------------------- structure

def split(text: str, separator: str) -> list[str]:
    """The parts of the text between separators (a regular expression) that are inside no brackets."""
    levels = [0, *depths(text)]
    cuts = [place for match in re.finditer(separator, text) if levels[match.start()] == 0 for place in match.span()]
    parts = [text[start:end].strip() for start, end in zip([0, *cuts[1::2]], [*cuts[::2], len(text)])]
    return list(filter(None, parts))


def interval(text: str) -> str:
    r"""The inequality `a < x \le b` (or `x > a`, ...) as `x \in (a,b]`; other text unchanged."""
    parts = RELATION.split(text)
    if len(parts) > 1 and parts[1] in (">", r"\ge"):
        parts = [{">": "<", r"\ge": r"\le"}.get(part, part) for part in reversed(parts)]
    if len(parts) == 3:
        parts = [r"-\infty", "<", *parts] if NAME.fullmatch(parts[0]) else [*parts, "<", r"\infty"]
    if len(parts) != 5 or not NAME.fullmatch(parts[2]) or not {parts[1], parts[3]} <= {"<", r"\le"}:
        return text
    low, open_low, name, open_high, high = parts
    return rf"{name} \in {'(' if open_low == '<' else '['}{low},{high}{')' if open_high == '<' else ']'}"


def named(text: str) -> tuple[str, str]:
    r"""The name and the value of `f(1) = 5`, `AB = BC = 5`, `5 = x`, `x \in (0,1)`; no name and the text otherwise."""
    parts = split(text, r"=|\\in\b") or [text]
    first, last = parts[0], parts[-1]
    if len(parts) > 2 and len(split(text, f",|{SEPARATOR}")) > 1:  # x = 1, y = 2
        return "", text
    if len(parts) > 1 and not NAME.fullmatch(first) and NAME.fullmatch(last):
        first, last = last, first
    is_named = len(parts) > 1 and NAME.fullmatch(first)
    return (first.replace(" ", "").replace("f(x)", "y"), last) if is_named else ("", text)


def structure(text: str) -> tuple[str, list[str]]:
    """The kind of a list (its brackets, or "," without any) and its parts; a single part if it is no list."""
    groups = [split(part, ",") for part in split(text, SEPARATOR)]
    sizes = set(map(len, groups))
    if len(groups) > 1 and len(sizes) == 1 != max(sizes) and all("=" in part for group in groups for part in group):
        return ",", [f"({','.join(group)})" for group in groups]  # p=5,q=2; p=7,q=2
    parts = [part.replace(r"\pm", sign).replace(r"\mp", other) for group in groups for part in group
             for sign, other in (("+", "-"), ("-", "+"))[: 1 + bool(re.search(r"\\[pm][mp]\b", part))]]
    if len(parts) > 1:
        if all(re.fullmatch(r"\{[^{}]*\}", part) for part in parts) and r"\cup" in text:
            return ",", list(dict.fromkeys(one for part in parts for one in split(part[1:-1], "[,;]")))
        return "and" if RELATION.search(text) and re.search(r"\band\b", text) else ",", parts
    *inner, end = depths(text)
    if text[0] in "({[" and end == 0 and 0 not in inner:  # one pair of brackets around it all
        inside = split(text[1:-1], "[,;]")
        return (text[0] + text[-1], inside) if len(inside) != 1 else structure(inside[0])
    return "", [text]


def same(gold: str, answer: str, verify) -> bool:
    """Whether the answer means what the gold answer means; `verify(gold, answer) -> bool` judges plain mathematics."""
    gold, answer = clean(gold), clean(answer)
    if not gold or not answer:
        return False
    letters = set() if is_prose(gold) else set(LETTER.findall(gold))
    fold = str if any(one != one.lower() in letters for one in letters) else str.casefold  # R and r differ
    closed = [re.sub(r"(?<!\d) | (?!\d)", "", fold(text)) for text in (gold, answer)]
    if closed[0] == closed[1]:
        return True
    for reading, equal in (date, eq), (quantity, same_quantity), (choice, eq):
        meanings = reading(gold), reading(answer)
        if all(meanings):
            return equal(*meanings)
    if is_prose(gold) and words(gold) == words(answer) != []:
        return True
    exact, is_rounded, _ = answer.partition(r" \approx ")
    if is_rounded:  # 1/3 \approx 0.33, but not x \approx 0.33
        return not NAME.fullmatch(exact) and same(gold, exact, verify)
    if gold.count(":") != answer.count(":") and "=" not in gold + answer or re.search(r"\?|^\\approx", answer):
        return False

    intervals = interval(gold), interval(answer)
    if all(map(RELATION.search, (gold, answer))) and (gold in intervals) != (answer in intervals):  # -x > -1
        return verify(gold, answer)
    gold, answer = intervals
    (name, value), (answered_name, answered) = named(gold), named(answer)
    has_name, answer_has_name = (re.search(r"=|\\in\b", text) for text in intervals)
    names = [named(part)[0] for part in split(answer, ",")]
    if name == answered_name != "" or name and (not answer_has_name or name == f"({','.join(names)})"):
        return same(value, answered, verify)
    if answered_name and not has_name:
        return same(gold, answered, verify)
    (kind, golds), (answer_kind, answers) = structure(gold), structure(answer)
    if len(golds) != len(answers) or not golds:
        return False
    if len(golds) > 1:
        return same_lists(golds, answers, {kind, answer_kind} - {","}, kind == answer_kind, verify)
    is_unsolved = name and "=" in answer and not LETTER.search(value)  # 2x = 10 for x = 5
    return not is_unsolved and same_formula(golds[0], answers[0], verify)


def same_lists(golds: list, answers: list, kinds: set, is_one_kind: bool, verify) -> bool:
    """Whether two lists of one length are the same: sets, and lists without brackets, in any order."""
    names = [[named(part)[0] for part in parts] for parts in (golds, answers)]
    distinct = [all(parts) and len(set(parts)) == len(parts) for parts in names]
    in_order = any(distinct) and not all(map(any, names))  # x = 1, y = 2 and 1, 2
    if in_order or kinds and kinds != {"{}"} and not (kinds == {"and"} and is_one_kind):
        return (in_order or kinds == {"()"} or is_one_kind) and all(map(same, golds, answers, [verify] * len(golds)))
    for part in golds:
        found = next((other for other in answers if same(part, other, verify)), None)
        if found is None:
            return False
        answers.remove(found)
    return True


def same_formula(gold: str, answer: str, verify) -> bool:
    """Whether two formulas are the same, perhaps with units behind, and the answer's with its working before it."""
    tails = [UNIT_TAIL.search(text) for text in (gold, answer)]
    if any(tails) and not HEDGE.search(answer) and not (r"\pi" in gold and "degree" in gold + answer):
        units = [frozenset(map(unit, re.findall("[A-Za-z]+", tail[0] if tail else ""))) - {"per"} for tail in tails]
        return same_units(*units) and same(UNIT_TAIL.sub("", gold), UNIT_TAIL.sub("", answer), verify)
    if is_prose(gold) or is_prose(answer):
        return False
    if "=" in answer and "=" not in gold:  # 3 + 4 = 7, \lim_{x \to 0} \cos x = 1, x^2 - 1 = (x - 1)(x + 1)
        working, _, result = answer.rpartition("=")
        is_working = (not LETTER.search(working) or re.match(r"\\(?:lim|int|sum|prod)(?![a-z])", working)
                      or same(working, result, verify))
        return bool(is_working) and same(gold, result, verify)
    return ("=" in gold) == ("=" in answer) and verify(gold, answer)


# ------------------------------------------------------------------------------------------------- found in a text

FORMULA = re.compile(r"(?<!\\)(?:\$\$?|\\[()\[\]])")  # where one begins or ends
BETWEEN = re.compile(r"(?:[\s$,;]|\\q?quad|\\text ?\{ ?(?:and|or) ?\}|\b(?:and|or)\b)*")  # boxes of one answer


def extract_answer(completion: str) -> str | None:
    """The text of the single complete `<answer>` block after the last `</think>`; None if there is no such block."""
    _, thought, rest = completion.rpartition("</think>")
    is_single = re.findall("</?answer>", rest) == ["<answer>", "</answer>"]
    return re.split("</?answer>", rest)[1].strip() if thought and is_single else None


def gold_answer(gold) -> str:
    r"""A data set's answer as text: behind `####` in a solution of GSM8K's, in the box in one of MATH's.

    Of other prose around LaTeX the last formula; `$69$, $84$` and `20 $cm^{2}$` are no prose.
    """
    text = str(gold)
    if "####" in text:
        return text.rpartition("####")[2].strip()
    before, *formulas = FORMULA.split(text)
    has_prose = re.search("[A-Za-z]{2}", before) or len(re.findall("[A-Za-z]{2,}", " ".join(formulas[1::2]))) > 2
    return last_box(text) or has_prose and last_formula(text) or text.strip()


def last_latex(text: str) -> str | None:
    r"""What is inside the last complete `\boxed{}`, or else the last of `$...$`, `$$...$$`, `\(...\)` and `\[...\]`."""
    return last_box(text) or last_formula(text)


def last_formula(text: str) -> str | None:
    """The last piece of LaTeX, of several with "," or "and" between them all."""
    pieces = FORMULA.split(text)  # every second one is LaTeX
    last = first = len(pieces) - 3 + len(pieces) % 2
    while first > 1 and BETWEEN.fullmatch(pieces[first - 1]) and pieces[first - 1].strip():
        first -= 2
    return ", ".join(pieces[first:last + 1:2]) or None if last > 0 else None


def last_box(text: str) -> str | None:
    r"""What is inside the last complete box, `\boxed{5}`, `\fbox{5}` or `\boxed 5`; of several in a row each once."""
    text = re.sub(r"\\boxed +([^\s{}$\\]+)", r"\\boxed{\1}", text)
    found, begin = [], len(text)
    for box in reversed([*re.finditer(r"\\f?box(?:ed)? *\{", text)][-100:]):
        inside = text[box.end():][:1000]
        levels = [*accumulate((letter == "{") - (letter == "}") for letter in re.sub(r"\\[{}]", "..", inside))]
        end = box.end() + levels.index(-1) + 1 if -1 in levels else math.inf
        if found and end <= begin and not BETWEEN.fullmatch(text[end:begin]):
            break
        if end <= begin:
            found.insert(0, text[box.end(): end - 1])
            begin = box.start()
    return ", ".join(dict.fromkeys(found)) or None
