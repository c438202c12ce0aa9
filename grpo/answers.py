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
    " ": ", ; : quad qquad \u00a0 \u202f", r"\\ ": "\\",
    "-": "− – —", "*": "times cdot ast × ⋅ ·", "/": "÷ ⁄", ".": "。", ",": "、", "'": "‘ ’ “ ”",
    "{": "lbrace", "}": "rbrace", "(": "langle ⟨ 【", ")": "rangle ⟩ 】", "<": "lt", ">": "gt", "|": "mid vert lvert rvert",
    r"\frac": "dfrac tfrac cfrac", r"\sqrt ": "√", r"\pi ": "π", r"\theta ": "θ", r"\infty ": "∞", r"\pm ": "±",
    r"\cup ": "bigcup ∪", r"\in ": "∈", r"\emptyset ": "oslash varnothing ∅", r"\ne ": "neq ≠", r"\approx ": "≈ thickapprox",
    r"\le ": "leq leqslant ≤ ⩽ ≦", r"\ge ": "geq geqslant ≥ ⩾ ≧", r"\setminus ": "backslash ∖", r"\angle ": "∠",
    r"\ldots ": "dots cdots …",
    " degree ": "circ degree °", " dollar ": "$", " euro ": "€", " pound ": "£", " yen ": "¥", " cent ": "¢",
    " 1/2": "½", " 1/4": "¼", " 3/4": "¾", " 1/3": "⅓", " 2/3": "⅔", r"(-\infty,\infty)": "ℝ",
}
SPELLING = {written: spelling for spelling, all_written in SPELLINGS.items() for written in all_written.split(" ")}
SPELLING |= {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F) if not chr(code).isdigit()}  # "：" -> ":"
SMALL = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻₀₁₂₃₄₅₆₇₈₉", "0123456789-0123456789")
CHINESE = "[\u4e00-\u9fff]"
CHINESE_UNITS = dict(pair.split() for pair in (
    "平方 square,立方 cubic,千米 km,公里 km,厘米 cm,毫米 mm,米 m,千克 kg,公斤 kg,克 g,吨 ton,毫升 ml,升 l,小时 hour,"
    "分钟 minute,秒 second,天 day,周 week,个月 month,年 year,度 degree,美元 dollar,欧元 euro,元 yuan,万 *10000,亿 *10^8").split(","))

CHINESE_HEDGES = "[约不或未非第乘除加减倍]|左右|至少|至多|最多|可能|大概|以上|以下"
GUESS = re.compile(r"(?i)\b(?:maybe|perhaps|possibl[ey]|probably|approx\w*|but|could|might)\b")
ORDINALS = dict(first="I", second="II", third="III", fourth="IV")


def matrix(match) -> str:
    """A LaTeX matrix as rows in brackets, a single column as one vector; as it is in a sum or product."""
    if re.search(r"[-+*\d]\s*$", match.string[: match.start()]) or re.match(r"\s*(?:[-+*^]|\\cdot|\\times)", match.string[match.end():]):
        return match[0]
    rows = [row.split("&") for row in re.split(r"\\\\(?:\[\w+\])?", match[1]) if row.strip()]
    return "(" + ",".join(row[0] if max(map(len, rows)) == 1 else f"({','.join(row)})" for row in rows) + ")"


def thousands(match) -> str:
    """Without thousands commas: "2,304" -> "2304", but "(100,200)" is a list, "(1,000, 200)" and "(1,000)" none."""
    before, text = match.string[: match.start()], match.string
    in_list = before.count("(") + before.count("[") + before.count("{") > sum(map(before.count, ")]}"))
    return match[0] if in_list and ", " not in text and ",0" not in match[0] else match[0].replace(",", "")


REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in (
    # ---- several lines, markup
    (r"(?is)^(?:(?!answer).)*\n(?:(?!answer).)*\banswer(?: is)?\W*[:=]", ""),  # "Step 1: Add\nFinal answer: 5" -> "5"
    (r"<(b|i|u|em|strong)>([^<>]*)</\1>", r"\2"),  # "<b>5</b>" -> "5"
    # ---- LaTeX
    (r"\\begin\{(?:[pbB]?matrix|array)\}(?:\{[clr|]*\})?((?:.|\n)*?)\\end\{(?:[pbB]?matrix|array)\}", matrix),
    (r"(?<=[\w)}\]])[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda match: "^{" + match[0].translate(SMALL) + "}"),  # "x²" -> "x^{2}"
    (r"(?<=[\w)}\]])[₀-₉]+", lambda match: "_" + match[0].translate(SMALL)),  # "x₁" -> "x_1"
    (r"\\mathbb ?\{?R\}?|\b(?:all )?real numbers\b", r"(-\\infty,\\infty)"),  # "all real numbers"
    (r"(?<=\d) ?(?:\{ ?, ?\}|,)(?: |\\!)*\\! ?(?=\d{3})|(?<=\d) ?\{ ?, ?\} ?(?=\d{3})", ","),  # "1{,}000", "1,\! 000" -> "1,000"
    (r"\{([^{}]*)\\over\b([^{}]*)\}", r"\\frac{\1}{\2}"),  # "{1 \over 2}" -> "\frac{1}{2}"
    (r"\\(?:text\w*|math\w+|mbox|operatorname|emph|vec|hat|f?box(?:ed)?)\s*\{([^{}]*)\}", r" \1 "),  # "\text{cm}" -> "cm"
    (r"\\f?box(?:ed)?\s*\{(.*)\}", r"\1"),  # "\boxed{\frac{1}{2}}" -> "\frac{1}{2}"
    (r"\\f?box(?:ed)? ", ""),  # "\boxed 5" -> "5"
    (r"\\([A-Za-z]+|[^A-Za-z])|[^\x00-\x7f]",  # see SPELLINGS
     lambda match: SPELLING.get(match[1] or match[0], match[0] if (match[1] or "a").isalpha() else match[1])),
    (r"[\u2600-\u27bf\ufe0f\U0001f000-\U0001faff]", ""),  # "5 🎉" -> "5"
    (r"(?<![\d,.])(\d+),(\d\d)(?= ?(?:\$|dollar|euro)(?! ?\d))", r"\1.\2"),  # "2,74 €" -> "2.74 €"
    (r"^\s*[$]\s*(?=[^$]*$)|(?<=\s)[$](?=\d[^$]*$)|^-[$](?=[^$]*$)", lambda match: match[0].replace("$", " dollar ")),
    (r"^(\d{4,}),(\d\d)$", r"\1.\2"),  # "1000,99" -> "1000.99"
    (r"^~ ?(?=\d)|= ?~", r"\\approx "),  # "~3"
    (r"[\s$~]+", " "), (r"^ +| +$", ""),
    (r"\*\*(?=[\w({-])(?<=[\w)}]\*\*)", "^"),  # "x**2" -> "x^2"
    (r"\*\*|__|[`\"]", ""), (r"^'(.*)'$", r"\1"),  # "**5**", "`5`", "'5'" -> "5"
    (r"\\frac ?\{ ?([a-z]+) ?\} ?\{ ?([a-z]+) ?\}|\{([\d,]+)\}/\{([\d,]+)\}", r"\1\3/\2\4"),  # "{1}/{2}" -> "1/2"
    # ---- Chinese
    (rf"(?<=[\d}}%)]) ?(?:和|与|及)(?=[\d({{\\-])", ", "), (r"(?<=[\d})]) ?或者?(?= ?[\dA-Za-z({\\-])", " or "),  # "1和2" -> "1, 2"
    (rf"(?<=[\d}}%)]) ?个?(?:[/每]?(?:{'|'.join(CHINESE_UNITS)}))+",  # "5平方米" -> "5 square m"
     lambda match: re.sub("|".join(CHINESE_UNITS), lambda one: f" {CHINESE_UNITS[one[0]]}", match[0])),
    (rf"^(?!.*(?:{CHINESE_HEDGES}))[^\d\\]*{CHINESE}[ :=]*(?=[\dA-Z\\([{{$-])", ""),  # "答案是5" -> "5"
    (rf"(?<=[\d}}%)a-z]) ?{CHINESE}[^\d]*$", lambda m: m[0] if re.search(CHINESE_HEDGES, m[0]) else ""),  # "5颗糖" -> "5"
    # ---- numbers, units, times
    (r"(?<=\d)(?<!\d{4}) (?=\d{3}(?!\d))", ","),  # "1 000" -> "1,000"
    (r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?!\d|,\d)", thousands),
    (r"(?<![A-Za-z\\])([ap])\.? ?m\b\.?", r" \1m"), (r"(?i)(?:\b12 )?\bnoon\b", "12:00 pm"),  # "3 P.M." -> "3 pm"
    (r"(?i)\bmidnight\b", "12:00 am"), (r"(?i) is (?:the|my) (?:final |correct )?answer\.?$", ""),
    (r"(?i)[,;.] (?:because|since|as|so|it|which|in|that|where|thus|hence|altogether|overall|respectively)\b[^\d]*$",  # "5, in total" -> "5"
     lambda match: match[0] if GUESS.search(match[0]) else ""),
    (r"(?<=[\d}%)]) ?\( ?([A-Za-z]{2}[\w .^/{}]*)\)$", r" \1"),  # "9 (apples)" -> "9 apples"
    (r"\^ ?\{? ?degree ?\}?|\bdegrees\b", " degree "),  # "90^\circ" -> "90 degree"
    (r"(?i)(?<=[\d}]) ?\b(?:per ?cent|pct)\b", "%"),
    (r"(?<=[\d/]) ?secs?\b", " second"),  # "5 ft/sec" -> "5 ft/ second"
    (r"\bmph\b", "mile hour"), (r"\bkph\b", "km hour"), (r"\b(?:and )?(?:a|one)[- ]half\b", "1/2"),
    (r"\{([:,])\}", r"\1"),
    (r"\b0b([01]+)", r"\1_2"), (r"\b0x([\dA-F]+)", r"\1_16"), (r" ?\(?\b(?:in )?base (\w+)\)?", r"_\1"),  # "11 base 2"
    (r"\(([\dA-Z]+)\)_", r"\1_"),
    (r"(?<=[\d }])([ckm]?m|in|ft|yd|inch|inches|foot|feet|(?:centi|kilo|milli)?met(?:er|re)s?) ?\^ ?\{?([23])\}?(?!\w)",
     lambda match: f" {'cubic' if match[2] == '3' else 'square'} {match[1]}"),  # "cm^2" -> "square cm"
    # ---- functions, relations, sets
    (r"(\\(?:sin|cos|tan|log|ln)) ?(\\[a-z]+|[a-z]) ?\*", r"\1(\2) *"),  # "\sin x * 2" -> "\sin(x) * 2"
    (r"\\(sin|cos|tan|cot) ?\(?(\d+) degree\)?", r"\\\1(\2\\pi/180)"),  # "\sin 30^\circ" -> "\sin(30\pi/180)"
    (r"_ ?\{ ?(\w+) ?\}", r"_\1"), (r"<=", r"\\le "), (r">=", r"\\ge "), (r"!=", r"\\ne "),  # "x_{1}" -> "x_1"
    (r"(?<![\\A-Za-z])(sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|pi|theta|alpha|beta|arc\w{3})(?![A-Za-z])", r"\\\1 "),
    (r"(?<![\\A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])", r"\\infty "),
    (r"\\sqrt ?\(([^()]*)\)|\\sqrt +(\d+|\w)", r"\\sqrt{\1\2}"), (r"\^ ?\(([^()]*)\)", r"^{\1}"),  # "sqrt(2)"
    (r"(?i)^(?:the )?(?:empty|null) set$|^\{ *\}$|^no (?:real )?solutions?\.?$", r"\\emptyset"),
    (r"(?i)\binfinite(?:ly many| number of)\b(?: solutions?)?", "infinite"),  # "infinitely many" -> "infinite"
    (r"(?i)^(?:it |the limit )?does(?: not|n't) exist$", "DNE"), (r"^<([^<>]*,[^<>]*)>$", r"(\1)"),  # "<1,2>" -> "(1,2)"
    (r"\{ *\\emptyset *\}", "the set of the empty set"),
    (r"^\{ ?[A-Za-z]( ?\\in[^|:]*)? ?[|:](.*)\}$", r"\2"),  # "{x | x > 1}" -> "x > 1"
    (r"^([^\[\]()]*[<>][^\[\]()]*): *([(\[].*[)\]])$", r"\2"),  # "x > 1: (1,\infty)" -> "(1,\infty)"
    (r"^\(-\\infty,\\infty\) ?(?:\\setminus|-) ?\{(.*)\}$", r"x \\ne \1"),  # "\mathbb{R}\setminus\{2\}"
    (r"^([A-Za-z]) ?\\ne ([^<>=,]*)$", r"\1 < \2 or \1 > \2"),  # "x \ne 2" -> "x < 2 or x > 2"
    (r"^\[ ?\[.*\] ?\]$", lambda match: match[0].replace("[", "(").replace("]", ")")),
    (r"^(?:minus|negative)\b", "-"), (r"^(\d+) to (\d+)$", r"\1:\2"),
    (r"[,;]? ?\(?(?:where )?[kmn] ?\\in ?Z ?\)?$", ""),  # "k\pi, k \in \mathbb{Z}" -> "k\pi"
    (r"^(?:on|in) (?:an? )?(?=[A-Z])", ""),  # "on a Monday" -> "Monday"
    (r"\b(first|second|third|fourth) quadrant\b", lambda match: "quadrant " + ORDINALS[match[1]]),
)]
LEAD_IN = re.compile(  # "So the final answer is", "Option", "The area is exactly", "Total =", "It ends at"
    r"(?i)(?!(?:s?he|they|we|you|i) (?:is|are) [a-z])(?:(?:so|thus|hence|therefore),? +)?(?:"
    r"(?:[a-z',()]+ +){0,9}?(?:is|are|be|equals?)\b:? *(?:exactly )?|"
    r"(?:[a-z',()]+ +){1,9}?(?:at|ha[sd]|have|paid|(?:make|take|measure|cost|earn|get|pay)s?)(?= (?:dollar )?\d)|"
    r"(?:the |final |correct )*(?:answer|result|option|choice)s?\b\W*?[:=]? *|"
    r"[a-z]{2,} ?= ?)?")
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
ARTICLES = set("a an the is are and The An A".split())
CURRENCIES = {"dollar", "euro", "pound", "yen", "cent"}
UNIT_TAIL = re.compile(rf"(?i)(?:(?: per)?[ /]+(?:{'|'.join(unit for unit in UNITS if len(unit) > 1)})s?)+$")
ATOM = r"(?:\\[a-z]+|[A-Z]{2,}|[A-Za-z])'*(?:_(?:\w+|\{[^{}]*\}))?(?:\^\{?-1\}?)?"
QUANTITY = (rf"(?:(?:\\[a-z]+ ?(?:\d |(?=\\|[\dA-Z]))?)?\{{?{ATOM}\}}? ?(?:{ATOM}|\([\w ,.+|\\-]*\))?"
            rf"|\|[A-Za-z \\]+\||\\frac ?\{{{ATOM}\}} ?\{{{ATOM}\}}|{CHINESE}+)")
NAME = re.compile(rf"\(?{QUANTITY}(?: ?[,:/] ?{QUANTITY}){{0,9}}\)?")  # "x", "f(1)", "|AB|", "\\cos A", "a:b", "(p,q)"
READABLE = r"[,;:=<>]|\bor\b|\band\b|\\(?:le|ge|ne|in|notin|cup|pm|ldots|approx|to)\b"
LETTER = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]")  # of a variable, not of a command
SEPARATOR = r",? ?\band\b|,? ?\bor\b|;|\\cup\b|\bU\b"
RELATION = re.compile(r" ?(<|>|\\le\b|\\ge\b) ?")
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
    found = re.findall(r"[\w']+|[-+*/^=<>%.]", text)
    return [unit(word) for word in found if word not in ARTICLES or word == found[-1]]


def is_prose(text: str) -> bool:
    text = re.sub(r"\\(?:begin|end) ?\{\w+\}", "", text)
    return bool(re.search(rf"(?<![\\A-Za-z_])(?!and\b)[A-Za-z']{{3}}|{CHINESE}", text))


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
    return (first.replace(" ", "").replace("f(x)", "y"), last) if len(parts) > 1 and NAME.fullmatch(first) else ("", text)


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


def can_be_read(text: str, read) -> bool:
    """Whether each part of the text, between commas and relations, is something for `read(text) -> expressions`."""
    return bool(text) and all(map(read, split(text, READABLE)))


def same(gold: str, answer: str, verify) -> bool:
    """Whether the answer means what the gold answer means; `verify(gold, answer) -> bool` judges plain mathematics."""
    gold, answer = clean(gold), clean(answer)
    if not gold or not answer:
        return False
    closed = [re.sub(r"(?<!\d) | (?!\d)", "", text.casefold()) for text in (gold, answer)]
    if closed[0] == closed[1]:
        return True
    if date(gold) and date(answer):
        return date(gold) == date(answer)
    quantities = quantity(gold), quantity(answer)
    if all(quantities):
        return same_quantity(*quantities)
    if choice(gold) and choice(answer):
        return choice(gold) == choice(answer)

    if is_prose(gold) and words(gold) == words(answer) != []:
        return True
    exact, is_rounded, _ = answer.partition(r"\approx")
    if is_rounded:  # 1/3 \approx 0.33, but not x \approx 0.33
        return bool(exact.strip()) and not NAME.fullmatch(exact.strip()) and same(gold, exact, verify)
    if "?" in answer or gold.count(":") != answer.count(":") and "=" not in gold + answer:
        return False
    if r"\begin" in answer:  # a sum of matrices
        return verify(gold, answer)
    written = gold, answer
    gold, answer = map(interval, written)
    if all(map(RELATION.search, written)) and (gold == written[0]) != (answer == written[1]):  # -x > -1
        return verify(*written)
    (name, value), (answered_name, answered) = named(gold), named(answer)
    if name[:1] == "(" and name[1:-1].split(",") == [named(part)[0] for part in split(answer, ",")]:  # (x,y) = (1,2)
        return same(value, answer, verify)
    if name == answered_name != "" or name and not re.search(r"=|\\in\b", answer):
        return same(value, answered, verify)
    if answered_name and not re.search(r"=|\\in\b", gold):
        return same(gold, answered, verify)

    (kind, golds), (answer_kind, answers) = structure(gold), structure(answer)
    kinds = {kind, answer_kind} - {","}
    if len(golds) != len(answers):
        return False
    if len(golds) > 1:
        names = [[named(part)[0] for part in parts] for parts in (golds, answers)]
        in_order = sorted(all(one) and len(set(one)) == len(one) for one in names) == [False, True] and not all(map(any, names))
        if not in_order and (kinds <= {"{}"} or kinds == {"and"} == {kind, answer_kind}):
            for part in golds:
                found = next((other for other in answers if same(part, other, verify)), None)
                if found is None:
                    return False
                answers.remove(found)
            return True
        return (in_order or kinds == {"()"} or kind == answer_kind) and all(map(same, golds, answers, [verify] * len(golds)))
    gold, answer = golds[0], answers[0]

    tails = [UNIT_TAIL.search(text) for text in (gold, answer)]
    if any(tails) and not HEDGE.search(answer) and not (r"\pi" in gold and "degree" in gold + answer):
        units = [frozenset(map(unit, re.findall("[A-Za-z]+", tail[0] if tail else ""))) - {"per"} for tail in tails]
        return same_units(*units) and same(UNIT_TAIL.sub("", gold), UNIT_TAIL.sub("", answer), verify)
    if is_prose(gold) or is_prose(answer):
        return False
    if "=" in answer and "=" not in gold:  # 3 + 4 = 7, \lim_{x \to 0} \cos x = 1
        working, _, result = answer.rpartition("=")
        is_working = (not LETTER.search(working)
                      or re.match(r"\\(?:lim|int|sum|prod)(?![a-z])", working) or same(working, result, verify))
        return bool(is_working) and same(gold, result, verify)
    is_unsolved = name and "=" in answer and not LETTER.search(value)  # 2x = 10 for x = 5
    return ("=" in gold) == ("=" in answer) and not is_unsolved and verify(gold, answer)


# ------------------------------------------------------------------------------------------------- found in a text

FORMULA = re.compile(r"(?<!\\)(?:\$\$?|\\[()\[\]])")  # where one begins or ends
BOX = re.compile(r"\\[{}]|\\f?box(?:ed)? *\{|\\boxed +(?P<bare>[^\s{}$\\]+)|[{}]")
BETWEEN_BOXES = re.compile(r"(?:[\s$,;]|\\q?quad|\\text ?\{ ?(?:and|or) ?\}|\b(?:and|or)\b)*")

def extract_answer(completion: str) -> str | None:
    """The text of the single complete `<answer>` block after the last `</think>`; None if there is no such block."""
    _, thought, rest = completion.rpartition("</think>")
    if not thought or rest.count("<answer>") != 1 or rest.count("</answer>") != 1:
        return None
    inside = rest.partition("<answer>")[2]
    return inside.partition("</answer>")[0].strip() if "</answer>" in inside else None


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
    found = pieces[1::2][: len(pieces) // 2]
    between = pieces[2::2]
    first = len(found) - 1
    while first > 0 and re.fullmatch(r"\s*(?:,|,?\s*\b(?:and|or)\b)\s*", between[first - 1]):
        first -= 1
    return ", ".join(found[first:]) or None


def last_box(text: str) -> str | None:
    r"""What is inside the last complete box: `\boxed{5}`, `\fbox{5}`, `\boxed 5`; of several in a row all, with commas."""
    openings, boxes = [], []  # (whether it is a box, its start, that of its inside); (start, end, inside)
    for token in BOX.finditer(text):
        if token["bare"]:
            boxes.append((token.start(), token.end(), token["bare"]))
        elif token[0] == "}" and openings:
            is_box, start, inside = openings.pop()
            if is_box:
                boxes = [box for box in boxes[-9:] if box[0] < start]  # but for those inside
                boxes.append((start, token.end(), text[inside: token.start()]))
        elif token[0][-1] == "{" and token[0] != r"\{":
            openings.append((len(token[0]) > 1, token.start(), token.end()))
    found = [boxes.pop()] if boxes else []
    while boxes and BETWEEN_BOXES.fullmatch(text[boxes[-1][1]: found[0][0]][:50]):
        found.insert(0, boxes.pop())
    return ", ".join(box[2] for box in found) or None
