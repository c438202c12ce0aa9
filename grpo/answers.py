"""What a written answer means: whether two of them say the same, as a careful human would read them.

`same(gold, answer, verify)` brings both texts to one spelling, takes lists, sets, intervals and matrices apart, and
compares dates, quantities with their units, multiple choice letters and words by itself, exactly. What is left is
mathematics for `verify(gold, answer)`: math-verify in a guarded process, see `math_judge`. Where a human would hesitate
the answer is wrong, because a reward for hedging teaches hedging.
"""
import re
from datetime import datetime
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

from dateutil import parser as dates

DEEPEST = 20  # brackets within brackets

SPELLINGS = {  # what is written in the end: LaTeX commands (without the backslash) and characters that mean it
    "": "left right displaystyle limits big Big bigl bigr Bigl Bigr ! ( ) [ ] # \u200b \u200e",
    " ": ", ; : quad qquad \u00a0 \u202f",
    "-": "− – —", "*": "times cdot ast × ⋅ ·", "/": "÷ ⁄", ".": "。", ",": "，", "'": "‘ ’ “ ”",
    "{": "lbrace", "}": "rbrace", "(": "langle ⟨", ")": "rangle ⟩", "<": "lt", ">": "gt",
    r"\frac": "dfrac tfrac cfrac", r"\sqrt ": "√", r"\pi ": "π", r"\theta ": "θ", r"\infty ": "∞", r"\pm ": "±",
    r"\cup ": "bigcup ∪", r"\in ": "∈", r"\emptyset ": "varnothing ∅", r"\ne ": "neq ≠",
    r"\le ": "leq leqslant ≤ ⩽", r"\ge ": "geq geqslant ≥ ⩾",
    " degree ": "circ degree °", " dollar ": "$", " euro ": "€", " pound ": "£", " yen ": "¥", " cent ": "¢",
    " 1/2": "½", " 1/4": "¼", " 3/4": "¾", " 1/3": "⅓", " 2/3": "⅔", r"(-\infty,\infty)": "ℝ",
}
SPELLING = {written: spelling for spelling, all_written in SPELLINGS.items() for written in all_written.split(" ")}
SMALL = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻₀₁₂₃₄₅₆₇₈₉", "0123456789-0123456789")


def matrix(match) -> str:
    """A LaTeX matrix as rows in brackets, a single column as one vector."""
    rows = [row.split("&") for row in re.split(r"\\\\(?:\[\w+\])?", match[1]) if row.strip()]
    return "(" + ",".join(row[0] if max(map(len, rows)) == 1 else f"({','.join(row)})" for row in rows) + ")"


REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"\\begin\{(?:[pbB]?matrix|array)\}(?:\{[clr|]*\})?((?:.|\n)*?)\\end\{(?:[pbB]?matrix|array)\}", matrix),
    (r"(?<=[\w)}\]])[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda match: "^{" + match[0].translate(SMALL) + "}"),
    (r"(?<=[\w)}\]])[₀-₉]+", lambda match: "_" + match[0].translate(SMALL)),
    (r"\\mathbb ?\{?R\}?|\ball real numbers\b", r"(-\\infty,\\infty)"),
    (r"\\(?:text\w*|math\w+|mbox|operatorname|emph|vec|hat|f?box(?:ed)?)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\f?box(?:ed)?\s*\{(.*)\}", r"\1"),
    (r"\\([A-Za-z]+|[^A-Za-z])|[^\x00-\x7f]",
     lambda match: SPELLING.get(match[1] or match[0], match[0] if (match[1] or "a").isalpha() else match[1])),
    (r"^\s*[$]\s*(?=[^$]*$)|(?<=\s)[$](?=\d[^$]*$)|^-[$](?=[^$]*$)", lambda match: match[0].replace("$", " dollar ")),
    (r"[\s$~]+", " "), (r"^ +| +$", ""),
    (r"\*\*(?=[\w({-])(?<=[\w)}]\*\*)", "^"),
    (r"\*\*|__|[`\"]", ""), (r"^'(.*)'$", r"\1"),
    (r"\\frac ?\{ ?([a-z]+) ?\} ?\{ ?([a-z]+) ?\}|\{([\d,]+)\}/\{([\d,]+)\}", r"\1\3/\2\4"),
    (r"(?<![A-Za-z\\])([ap])\.? ?m\b\.?", r" \1m"), (r"(?i)(?:\b12 )?\bnoon\b", "12:00 pm"),
    (r"(?i)\bmidnight\b", "12:00 am"), (r"(?i) is (?:the|my) (?:final |correct )?answer\.?$", ""),
    (r"\^ ?\{? ?degree ?\}?|\bdegrees\b", " degree "), (r"(?i)(?<=[\d}]) ?\b(?:per ?cent|pct)\b", "%"),
    (r"\bmph\b", "mile hour"), (r"\bkph\b", "km hour"), (r"\b(?:and )?(?:a|one)[- ]half\b", "1/2"),
    (r"\{([:,])\}", r"\1"), (r"(?<=\d)(?<!\d{4}) (?=\d{3}(?!\d))", ","),
    (r"\b0b([01]+)", r"\1_2"), (r"\b0x([\dA-F]+)", r"\1_16"), (r" ?\(?\b(?:in )?base (\w+)\)?", r"_\1"),
    (r"\(([\dA-Z]+)\)_", r"\1_"),
    (r"(?<=[\d }])([ckm]?m|in|ft|yd|inch|inches|foot|feet|(?:centi|kilo|milli)?met(?:er|re)s?) ?\^ ?\{?([23])\}?(?!\w)",
     lambda match: f" {'cubic' if match[2] == '3' else 'square'} {match[1]}"),
    (r"_ ?\{ ?(\w+) ?\}", r"_\1"), (r"<=", r"\\le "), (r">=", r"\\ge "), (r"!=", r"\\ne "),
    (r"(?<![\\A-Za-z])(sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|pi|theta|alpha|beta|arc\w{3})(?![A-Za-z])", r"\\\1 "),
    (r"(?<![\\A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])", r"\\infty "),
    (r"\\sqrt ?\(([^()]*)\)|\\sqrt +(\d+|\w)", r"\\sqrt{\1\2}"), (r"\^ ?\(([^()]*)\)", r"^{\1}"),
    (r"^(?:the )?(?:empty|null) set$|^\{ *\}$", r"\\emptyset"), (r"^<([^<>]*,[^<>]*)>$", r"(\1)"),
    (r"\{ *\\emptyset *\}", "the set of the empty set"),
    (r"^\[ ?\[.*\] ?\]$", lambda match: match[0].replace("[", "(").replace("]", ")")),
    (r"^(?:minus|negative)\b", "-"), (r"^([^A-Za-z=]+)= ?([A-Za-z])$", r"\2=\1"), (r"^(\d+) to (\d+)$", r"\1:\2"),
)]
LEAD_IN = re.compile(  # "So the final answer is", "Option", "The area is exactly", "Total =", "AB =", "It ends at"
    r"(?i)(?:(?:so|thus|hence|therefore),? +)?(?:"
    r"(?:[a-z',()]+ +){0,9}?(?:is|are|be|equals?)\b:? *(?:exactly )?|"
    r"(?:[a-z',()]+ +){1,9}?(?:at|ha[sd]|have|paid|(?:make|take|measure|cost|earn|get|pay)s?)(?= (?:dollar )?\d)|"
    r"(?:the |final |correct )*(?:answer|result|option|choice)s?\b\W*?[:=]? *|"
    r"(?:\\angle ?|∠)?[a-z]{2,} ?= ?)?")
HEDGE = re.compile(
    r"(?i)\b(?:or|not|never|about|approx\w*|roughly|around|maybe|perhaps|possibl[ey]|probably|either|neither|but|if|"
    r"unless|between|than|least|most|less|more|fewer|over|under|nearly|almost|rounded|estimate\w*|too|except|cannot|"
    r"can't|could|might|wrong|incorrect|twice|doubled?|tripled?|halved|half (?:of|the)|square of|root|divisible|any|"
    r"multiple|factor(?:ial)?|pairs|score|\d+(?:st|nd|rd|th)|plus|minus|times|first|step|cases?)\b|"
    r"n't\b|\?|\\approx|\.\.|"
    r"\d ?-?(?:squared|cubed|ish)\b|\d ?'")
NAMES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
         "seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
SPELLED = {name: n for n, name in enumerate(NAMES)} | {
    ten + (f"-{NAMES[one]}" if one else ""): 10 * n + one for n, ten in enumerate(TENS, 2) for one in range(10)}
SPELLED_OUT = re.compile(rf"(?i)\b({'|'.join(sorted(SPELLED, key=len, reverse=True)).replace('-', '[- ]')})\b")
SCALES = dict(dozen=12, hundred=100, thousand=10**3, million=10**6, billion=10**9, trillion=10**12)
PARTS = dict(half=2, halve=2, third=3, quarter=4, fourth=4, fifth=5, sixth=6, seventh=7, eighth=8, ninth=9, tenth=10)
UNITS = {word: line.split()[0] for line in """degree deg; dollar usd buck; euro eur; pound lb gbp; yen jpy; cent;
m meter metre; cm centimeter centimetre; mm millimeter millimetre; km kilometer kilometre; inch inche; foot feet ft;
yard yd; mile mi; g gram; kg kilogram; mg milligram; oz ounce; ton tonne; l liter litre; ml milliliter millilitre;
s second sec; min minute; h hour hr; day; week wk; month; year yr; square sq squared; cubic cu cubed; radian rad; unit;
c celsius; f fahrenheit; n newton; k kelvin; ohm""".split(";") for word in line.split()}
FILLER = set("a an the is are there of in it per all total altogether has have had will be exactly only just left each "
             "so on and he she they we i you gets needs pays spent costs".split())
CURRENCIES = {"dollar", "euro", "pound", "yen", "cent"}
UNIT_TAIL = re.compile(rf"(?i)(?:[ /]+(?:{'|'.join(unit for unit in UNITS if len(unit) > 1)})s?)+$")
RELATION = re.compile(r" ?(<|>|\\le\b|\\ge\b) ?")
ASSIGNED = re.compile(  # the name in front of the only "=" or "\in"
    r"\(?(?:\\[a-z]+|[A-Za-z])(?:_\w+)?(?: ?, ?\\?[A-Za-z]+)*\)?(?:\([a-z]\))? ?(?:=|\\in\b) ?(?!.*(?:=|\\in\b))")


def depths(text: str) -> list[int]:
    """How many brackets are open after each character."""
    return list(accumulate((letter in "({[") - (letter in ")}]") for letter in text))


@lru_cache(maxsize=10000)
def clean(text: str) -> str:
    """The text in one spelling, without decoration and lead-in; nothing, if no human would read it."""
    if max(depths(text), default=0) > DEEPEST:
        return ""
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip(" *_`#:=").rstrip(".,; *_")
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
    return [unit(word) for word in re.findall(r"[\w']+|[-+*/^=<>%.]", text) if word.lower() not in FILLER]


def is_prose(text: str) -> bool:
    return bool(re.search(r"(?<![\\A-Za-z])[A-Za-z']{3}", text))


# ------------------------------------------------------------------------------------------------- readings

def date(text: str) -> list | None:
    """A date or a time, read twice with other defaults, so that a missing part is no part that happens to agree."""
    month = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec"
    if len(text) > 40 or not re.search(rf"(?i)\d:\d\d|\d/\d+/\d|\d ?[ap]m\b|\d-\d\d?-\d|\b(?:{month})", text):
        return None
    defaults, zones = (datetime(1999, 1, 1), datetime(2000, 2, 2)), re.findall(r"\b[A-Z]{1,3}T\b|\bUTC\b", text)
    try:
        return [*zones, *(dates.parse(text, default=default, ignoretz=True) for default in defaults)]
    except (ValueError, OverflowError):
        return None


NUMERALS = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"(?<=\d) ?in$", " inch"),
    (SPELLED_OUT, lambda match: str(SPELLED[match[0].lower().replace(" ", "-")])),
    (r"(\d+) hundred(?: and)? (\d\d?)\b", lambda match: str(int(match[1]) * 100 + int(match[2]))),
    (rf"(\d+)[- ]({'|'.join(PARTS)})s?\b", lambda match: f"{match[1]}/{PARTS[match[2]]}"),
    (r"\.(\d*) ?\\(?:overline|bar) ?\{ ?(\d+) ?\}", r".\1~\2"),
    (r"(?<![\d.*])(?<!\* )10 ?\^", "1*10^"),
    (r"(\d)(?:[eE]| ?\* ?10 ?\^ ?)\{?([-+]?\d{1,3})(?!\d)\}?", r"\1@\2"),
    (r"\\frac ?(?:\{(-?\d+)\}|(\d)) ?(?:\{(-?\d+)\}|(\d))", r" \1\2/\3\4 "),
    (r"(?<=[a-z]) ?/ ?(?=[a-z])", " "),
)]
NUMBER = re.compile(r"(?P<sign>[-+]?) ?(?P<whole>\d{1,3}(?:,\d{3})+|\d*)(?:\.(?P<decimals>\d*)(?:~(?P<repeated>\d+))?)?"
                    r"(?:@(?P<exponent>[-+]?\d{1,3}))?"
                    r"(?: ?/ ?(?P<over>0*[1-9]\d*)| (?P<top>\d+) ?/ ?(?P<bottom>0*[1-9]\d*))? ?(?P<percent>%?)")


@lru_cache(maxsize=10000)
def quantity(text: str) -> tuple[Fraction, str, frozenset] | None:
    """One number, exactly: its value, "%" if it is a percentage, and the words beside it, units in one spelling."""
    based = re.fullmatch(r"([0-9A-Z]+)_(\w+)", text)
    if based:
        base = SPELLED.get(based[2].lower()) or int(based[2] if based[2].isdecimal() else 0)
        valid = 2 <= base <= 36 and all(int(digit, 36) < base for digit in based[1])
        return (Fraction(int(based[1], base)), "", frozenset([f"base {base}"])) if valid else None
    if HEDGE.search(text):
        return None
    for pattern, replacement in NUMERALS:
        text = pattern.sub(replacement, text)
    number = NUMBER.fullmatch(" ".join(re.sub(r"[A-Za-z][A-Za-z']*", " ", text).split()))
    if not number or not (number["whole"] or number["decimals"] or number["repeated"]):
        return None
    whole, decimals, repeated = number["whole"].replace(",", ""), number["decimals"] or "", number["repeated"] or "0"
    value = Fraction(f"{whole or 0}.{decimals or 0}e{number['exponent'] or 0}")
    value += Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(decimals))
    value = value / int(number["over"] or 1) + Fraction(int(number["top"] or 0), int(number["bottom"] or 1))
    units = set()
    for match in re.finditer(r"[A-Za-z][A-Za-z']*", text):
        word, is_before = match[0].lower(), not re.search(r"\d", text[: match.start()])
        if is_before and word not in FILLER and unit(word) not in CURRENCIES:  # "double 36", "almost 100"
            return None
        if len(word) == 1 and text[match.start() - 1].isdigit():  # 5m may be a product
            return None
        if word in SCALES:
            value *= SCALES[word]
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
    several = match and (HEDGE.search(match[2]) or re.search(r"\([A-J]\)|\b[A-J][.)]|^,|^and\b", match[2]))
    return match[1].upper() if match and not several else None


# ------------------------------------------------------------------------------------------------- structure

def split(text: str, separator: str) -> list[str]:
    """The parts of the text between separators (a regular expression) that are inside no brackets."""
    parts, depth = [""], 0
    for token in re.split(rf"([({{\[]|[)}}\]]|{separator})", text):
        if depth == 0 and token and re.fullmatch(separator, token):
            parts.append("")
            continue
        depth += (token in tuple("({[")) - (token in tuple(")}]"))
        parts[-1] += token
    return [part.strip() for part in parts if part.strip()]


def interval(text: str) -> str:
    r"""The inequality `a < x \le b` (or `x > a`, ...) as `x \in (a,b]`; other text unchanged."""
    parts = RELATION.split(text)
    if len(parts) > 1 and parts[1] in (">", r"\ge"):
        parts = [{">": "<", r"\ge": r"\le"}.get(part, part) for part in reversed(parts)]
    if len(parts) == 3:
        parts = [r"-\infty", "<", *parts] if re.fullmatch("[A-Za-z]", parts[0]) else [*parts, "<", r"\infty"]
    if len(parts) != 5 or not re.fullmatch("[A-Za-z]", parts[2]) or not {parts[1], parts[3]} <= {"<", r"\le"}:
        return text
    low, open_low, name, open_high, high = parts
    return rf"{name} \in {'(' if open_low == '<' else '['}{low},{high}{')' if open_high == '<' else ']'}"


def structure(text: str) -> tuple[str, list[str]]:
    """The kind of a list (its brackets, or "," without any) and its parts; a single part if it is no list."""
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        return "", [text]
    if r"\pm" in text:
        return ",", [text.replace(r"\pm", sign) for sign in "+-"]
    for separator in (r"\\cup|\bU\b", r", ?and\b|, ?or\b|\band\b|\bor\b|;|, ", ","):
        parts = split(text, separator)
        if len(parts) > 1:
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
    closed = [re.sub(r"(?<!\d) | (?!\d)", "", text.casefold()) for text in (gold, answer)]
    if closed[0] == closed[1]:
        return True
    if date(gold) or date(answer):
        return date(gold) == date(answer)
    quantities = quantity(gold), quantity(answer)
    if all(quantities):
        return same_quantity(*quantities)
    if choice(gold) and choice(answer):
        return choice(gold) == choice(answer)

    if is_prose(gold) and words(gold) == words(answer) != []:
        return True
    gold, answer = interval(gold), interval(answer)
    names = [ASSIGNED.match(text) for text in (gold, answer)]
    if all(names) and names[0][0].replace(" ", "") == names[1][0].replace(" ", ""):
        return same(gold[names[0].end():], answer[names[1].end():], verify)
    if names[0] and "=" not in answer and r"\in" not in answer.split():
        return same(gold[names[0].end():], answer, verify)
    if names[1] and "=" not in gold and r"\in" not in gold.split():
        return same(gold, answer[names[1].end():], verify)

    (kind, golds), (answer_kind, answers) = structure(gold), structure(answer)
    kinds = {kind, answer_kind} - {","}
    if len(golds) != len(answers):
        return False
    if len(golds) > 1 and (kinds <= {"{}"} or kinds == {"and"} == {kind, answer_kind}):  # in any order
        for part in golds:
            found = next((other for other in answers if same(part, other, verify)), None)
            if found is None:
                return False
            answers.remove(found)
        return True
    if len(golds) > 1:
        return (kinds == {"()"} or kind == answer_kind) and all(map(same, golds, answers, [verify] * len(golds)))
    gold, answer = golds[0], answers[0]

    tails = [UNIT_TAIL.search(text) for text in (gold, answer)]
    if any(tails) and not HEDGE.search(answer) and not (r"\pi" in gold and "degree" in gold + answer):
        units = [frozenset(map(unit, re.findall("[A-Za-z]+", tail[0] if tail else ""))) for tail in tails]
        return same_units(*units) and same(UNIT_TAIL.sub("", gold), UNIT_TAIL.sub("", answer), verify)
    if is_prose(gold) or is_prose(answer):
        return False
    if ("=" in gold) != ("=" in answer):  # 3 + 4 = 7
        working, _, result = answer.rpartition("=")
        return "=" not in gold and not re.search(r"(?<![\\A-Za-z])[A-Za-z]", working) and same(gold, result, verify)
    return verify(gold, answer)


# ------------------------------------------------------------------------------------------------- found in a text

def extract_answer(completion: str) -> str | None:
    """The text of the single complete `<answer>` block after the last `</think>`; None if there is no such block."""
    _, thought, rest = completion.rpartition("</think>")
    if not thought or rest.count("<answer>") != 1 or rest.count("</answer>") != 1:
        return None
    inside = rest.partition("<answer>")[2]
    return inside.partition("</answer>")[0].strip() if "</answer>" in inside else None


def gold_answer(gold) -> str:
    """A data set's answer as text; GSM8K writes it behind `####`, at the end of the solution."""
    return str(gold).rpartition("####")[2].strip()


def last_latex(text: str) -> str | None:
    r"""What is inside the last complete `\boxed{}`, or else the last of `$...$`, `$$...$$`, `\(...\)` and `\[...\]`."""
    _, boxed, rest = text.rpartition(r"\boxed{")
    for end, depth in enumerate(accumulate((letter == "{") - (letter == "}") for letter in rest if boxed)):
        if depth < 0:
            return rest[:end]
    parts = re.split(r"(?<!\\)(?:\$\$?|\\[()\[\]])", text)  # every second one is mathematics
    return parts[-3 + len(parts) % 2] if len(parts) > 2 else None
