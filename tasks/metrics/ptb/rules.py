"""The rules of the Penn Treebank lexer as the official caption evaluation runs it (Stanford CoreNLP 3.4.1).

At each place the rule whose pattern, together with what must follow it, matches furthest makes the next word; of equally long matches
the first rule. Patterns are those of `tasks.metrics.ptb.patterns`: letters match in either case, classes as written. Letters outside ASCII
are the stand-ins of `tasks.metrics.ptb.words`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tasks.metrics.ptb import words as write
from tasks.metrics.ptb.words import DIGIT, LETTER, MARK, SYMBOL

__all__ = [
    "BEFORE_LOWER_CASE", "BEFORE_NUMBERS", "BEFORE_UPPER_CASE", "FILE_ENDINGS", "HYPHENATED_INITIALS", "INITIALS", "LINE_BREAK",
    "RULES", "SENTENCE_OPENERS", "Rule",
]  # fmt: skip


# ----------------------------------------
# Abbreviations that keep their dot, as patterns of `tasks.metrics.ptb.patterns`; in brackets what must be written so.


def _one_of(words: str) -> str:
    return "|".join(words.split())


# Months, days, states, companies, titles after a name.
BEFORE_LOWER_CASE = _one_of(r"""
    jan feb mar apr jun jul aug sept? oct nov dec mon tues? wed thu thurs fri
    ala ariz [A]z [A]rk calif colo conn ct dak [D]el fla ga [I]ll ind kans? ky [L]a [M]ass md mich minn [M]iss mo mont neb nev okla [O]re
    [P]a penn tenn [T]ex va vt [W]ash wisc? wyo
    inc cos? corp pp?t[ye]s? ltd plc rt bancorp bhd assn univ intl sys tel est ext sq jr sr bros ed\.d ph\.d blvd rd esq etc al seq bldg
""")
# Titles before a name.
BEFORE_UPPER_CASE = _one_of(r"""
    mr [M]iss mrs ms drs? profs? sens? reps? attys? lt col gen messrs govs? adm rev maj sgt cpl pvt mt capt ste? ave pres lieut hon brig
    co?mdr pfc spc supts? det mlle mme msgr ens insp sfc asst assoc adj adv elec invt natl m[ft]g dept ft vs alex wm jos cie cf treas ph a\.k\.a
""")
BEFORE_NUMBERS = _one_of("ca figs? prop nos? art bldg pp op")
INITIALS = r"[A-Za-z](\.[A-Za-z])*"
HYPHENATED_INITIALS = r"(canada|sino|korean|eu|japan|non)-u\.s|u\.s\.-(u\.k|u\.s\.s\.r)"
FILE_ENDINGS = _one_of("""
    bat bmp c class cgi cpp dll docx? exe gif gz h html? jar java jpe?g mov mp3 pdf php pl png ppt ps py sql tar txt wav x xml zip
""")
# Words that open a sentence: an acronym before one of them ends its own.
SENTENCE_OPENERS = r"""
    About According Additionally After An A As At But Earlier He Her Here However If In It Last Many More Mr\. Ms\. Now Once One Other Our
    She Since So Some Such That The Their Then There These They This We When While What Yet You
""".split()


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One kind of word.

    pattern  what the word is made of
    ahead    what must follow and is left for the next word; empty if anything may
    written  gives the word for the matched text; "" for none
    reread   how many letters at the end of the word the next word begins with as well
    """

    pattern: str
    ahead: str = ""
    written: Callable[[str], str] = write.same
    reread: int = 0


# Letters by kind; each is the inside of a class.
_ALPHA = f"a-zA-Z\u017f\u0130\u0131\u212a{LETTER}"
_DIGITS = f"0-9{DIGIT}"
_BLANKS = " \t\u00a0\u2000-\u200a\u3000"
_HYPHENS = "\\-\u058a\u2010\u2011"
_SINGLE_QUOTES = "`\u0091\u2018\u201b"

_SPACE = f"[{_BLANKS}]"
LINE_BREAK = "(\r|\r?\n|\u2028|\u2029|\v|\f|\u0085)"
_GAP = f"({_SPACE}|{LINE_BREAK})"
_NUMERAL = f"[{_DIGITS}]"
_IN_WORD = f"([{_ALPHA}{MARK}\u00ad]|&[aeiouAEIOU](acute|grave|uml);)"
_WORD = f"{_IN_WORD}({_IN_WORD}|{_NUMERAL})*([.!?]{_IN_WORD}({_IN_WORD}|{_NUMERAL})*)*"
_APOSTROPHE = "(['\u0092\u2019]|&apos;)"
_ANY_APOSTROPHE = f"({_APOSTROPHE}|[{_SINGLE_QUOTES}])"
_CLITIC = f"{_APOSTROPHE}([msdMSD]|re|ve|ll)"
_NOT = f"n{_ANY_APOSTROPHE}t"
_PAUSE = "[,;:\u3001]"
_TAG_NAME = "[A-Za-z][A-Za-z0-9:._\\-]*"
_ATTRIBUTE = f"{_TAG_NAME}|{_TAG_NAME} *= *('[^']*'|\"[^\"]*\")"
_TAG = f"<([!?][A-Za-z\\-][^>\r\n]*|{_TAG_NAME}( +({_ATTRIBUTE}))* */?|/{_TAG_NAME}) *>"


def _splits() -> Sequence[Rule]:
    """Words that are two: can|not, gon|na, got|ta, gim|me, 't|is."""
    pairs = (("can", "not"), ("gon|wan", "na"), ("got", "ta"), ("lem|gim", "me"), ("'t", "is|was"))
    return [Rule(pattern=first, ahead=second) for first, second in pairs]


def _words() -> Sequence[Rule]:
    elided = (
        f"{_APOSTROPHE}(n{_APOSTROPHE}?|em|[2-9]0s|till?|cause)|[lLdDjJ]{_APOSTROPHE}|(dunkin|somethin|ol){_APOSTROPHE}"
        f"|[A-HJ-XZn]{_ANY_APOSTROPHE}[{_ALPHA}]{{2}}[{_ALPHA}]*|[{_ALPHA}]+[aeiouyAEIOUY]{_ANY_APOSTROPHE}[aeiouA-Z][{_ALPHA}]*"
        f"|cont'd\\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l|o{_ANY_APOSTROPHE}o"
    )
    return [
        Rule(pattern=_TAG, written=write.joined),
        Rule(pattern="&(md|mdash|ndash);|[\u0096\u0097\u2013-\u2015]", written=write.always("--")),
        Rule(pattern="&amp;", written=write.ampersands),
        Rule(pattern="&(ht|tl|ur|lr|qc|ql|qr|odq|cdq|#[0-9]+);"),
        Rule(pattern=_WORD, ahead=_CLITIC, written=write.unhyphenated),
        Rule(pattern="[A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*", ahead=_NOT, written=write.unhyphenated),
        Rule(pattern=_WORD, written=write.unhyphenated),
        Rule(pattern=elided),
        Rule(pattern=f"y{_APOSTROPHE}", ahead=f"[{_ALPHA}]"),
    ]


def _addresses() -> Sequence[Rule]:
    stop, edge = ' \t\n\f\r"<>|', ".!?(){},"
    path = f"(/[^{stop}()]+[^{stop}{edge}\\-])?"
    # The official class for the parts of a host name holds the range from the comma to the underscore: no digits, no capitals.
    host = f"(www\\.([^{stop}{edge}]+\\.)+[a-zA-Z]{{2,4}}|([^{stop}`'.!?(){{}},-_$]+\\.)+(com|net|org|edu))"
    return [
        Rule(pattern=f"https?://[^{stop}(){{}}]+[^{stop}{edge}\\-]"),
        Rule(pattern=host + path),
        Rule(pattern=f"(&lt;|<)?[a-zA-Z0-9][^{stop}()\u00a0{{}}]*@([^{stop}(){{}}.\u00a0]+\\.)*[^{stop}(){{}}.\u00a0]+(&gt;|>)?"),
        Rule(pattern=f"@[a-zA-Z_][a-zA-Z_0-9]*|#{_IN_WORD}+"),
        Rule(pattern=f"{_CLITIC}|{_NOT}", ahead="[^A-Za-z]", written=write.in_ascii),
        Rule(pattern=_NOT, written=write.in_ascii),
    ]


def _numbers() -> Sequence[Rule]:
    d = _NUMERAL
    part = "[A-Za-z0-9]+(-[A-Za-z]+){0,2}"
    return [
        Rule(pattern=f"{d}{{1,2}}[\\-/]{d}{{1,2}}[\\-/]{d}{{2,4}}"),
        Rule(pattern=f"[\\-+]?({d}+|{d}*([.:,\u00ad\u066b\u066c]{d}+)+)", written=write.unhyphenated),
        Rule(pattern="[\u207a\u207b\u208a\u208b]?([\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+)"),
        Rule(pattern=f"({d}{{1,4}}[\\- \u00a0])?{d}{{1,4}}(\\\\?/|\u2044){d}{{1,4}}", written=write.joined),
        Rule(pattern="[\u00bc-\u00be\u2153-\u215e]", written=write.in_fractions),
        Rule(
            pattern=f"-(rrb|lrb|rcb|lcb|rsb|lsb)-|c\\.d\\.s|pro-|anti-|s(&|&amp;)(p-500|ls)|cap{_APOSTROPHE}n|c{_APOSTROPHE}est",
            written=write.ampersands,
        ),
        Rule(pattern=f"{part}(\\\\?/{part}){{1,2}}"),
        Rule(pattern="[A-Z]*\\$|#"),
        Rule(pattern="[\u0080\u00a2-\u00a5\u060b\u0e3f\u20a0\u20a4\u20ac\uffe0\uffe1\uffe5\uffe6]", written=write.in_dollars),
    ]


def _abbreviations() -> Sequence[Rule]:
    openers = "|".join(f"[{word[0]}]{word[1:]}" for word in SENTENCE_OPENERS)
    initials = f"{INITIALS}|{HYPHENATED_INITIALS}"
    name = f"({_IN_WORD}|{_NUMERAL})+"
    return [
        # Before these an acronym ends its sentence.
        Rule(pattern=f"({initials})\\.", ahead=f"{_GAP}+({openers}|{_TAG}){_GAP}", written=write.undotted_initial),
        Rule(pattern=f"({BEFORE_NUMBERS})\\.", ahead=f"{_GAP}?{_NUMERAL}"),
        Rule(pattern=f"({BEFORE_LOWER_CASE})\\.", ahead="[^][^]"),
        Rule(pattern=f"({BEFORE_LOWER_CASE})\\.", reread=1),  # at the end of the file: "etc." and the dot of the sentence
        Rule(pattern=f"({BEFORE_UPPER_CASE}|{initials})\\."),
        Rule(pattern=initials, ahead=_GAP),
        Rule(pattern=f"{_APOSTROPHE}[0-9][0-9]", ahead=_GAP),
        Rule(pattern=f"{name}(\\.{name})*\\.({FILE_ENDINGS})", ahead=f"{_GAP}|[.?!,]"),
        Rule(pattern=f"{_WORD}\\.", ahead=_PAUSE, written=write.unhyphenated),
    ]


def _phones_and_faces() -> Sequence[Rule]:
    gap = "[\\- \u00a0]"
    area = f"(\\([0-9]{{2,3}}\\)[ \u00a0]?|(\\+\\+?)?([0-9]{{2,4}}{gap})?[0-9]{{2,4}}{gap})"
    dotted = "((\\+\\+?)?[0-9]{2,4}\\.)?[0-9]{2,4}\\.[0-9]{3,4}\\.[0-9]{3,5}"
    # The last kind of face is the official rule as its tool reads it: a misplaced backslash makes it want a bracket, and ~ means "up to".
    eyes = "\\^x=~<>"
    asian = (
        f"[\\-{eyes}']_[\\-{eyes}']|\\([\\-{eyes}'][_.]?[\\-{eyes}']\\)|\\([{eyes}']-[{eyes}'`]\\)"
        f"|[{eyes}]\\.\\[\\^x=[^<]*<>\\]"
    )
    return [
        Rule(pattern=f"{area}[0-9]{{3,4}}{gap}?[0-9]{{3,5}}|{dotted}", written=write.dialled),
        Rule(pattern="[<>]?[:;=][\\-o*']?[()DPdpO\\\\{@|\\[\\]]", ahead="[^A-Za-z0-9]", written=write.bracketed),
        Rule(pattern=asian, written=write.bracketed),
    ]


def _compounds() -> Sequence[Rule]:
    """Words held together by hyphens, underscores and ampersands; a dot before a comma is not theirs."""
    initials = f"([A-Za-z](\\.[A-Za-z])+|{HYPHENATED_INITIALS})\\."
    hyphenated = f"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(-([A-Za-z0-9\u00ad]+|{initials}))+"
    part = f"([dDoOlL]{_ANY_APOSTROPHE}[{_ALPHA}{_DIGITS}])?[{_ALPHA}{_DIGITS}]+"
    joined = f"{part}([_{_HYPHENS}]{part})*"
    firm = "[A-Z]+(([+&]|&amp;)[A-Z]+)+"
    kinds = ((hyphenated, write.unhyphenated), (joined, write.same), (firm, write.ampersands))
    dotted = [Rule(pattern=f"{kind}\\.", ahead=_PAUSE, written=written) for kind, written in kinds]
    return dotted + [Rule(pattern=kind, written=written) for kind, written in kinds]


def _marks() -> Sequence[Rule]:
    named = (("{", "-LCB-"), ("}", "-RCB-"), ("[", "-LSB-"), ("]", "-RSB-"), ("(", "-LRB-"), (")", "-RRB-"))
    quotes = f"{_SINGLE_QUOTES}\u0092-\u0094\u00ab\u00bb\u2019\u201a\u201c-\u201f\u2039\u203a"
    return [
        Rule(pattern='"|&quot;', written=write.in_ascii),
        Rule(pattern="<|&lt;", written=write.always("<")),
        Rule(pattern=">|&gt;", written=write.always(">")),
        *(Rule(pattern=f"\\{mark}", written=write.always(name)) for mark, name in named),
        Rule(pattern="-+", written=write.hyphens),
        Rule(pattern="\\.{3,5}|(\\.[ \u00a0]){2,4}\\.|[\u0085\u2026]", written=write.always("...")),
        Rule(pattern=f"@+|#+|_+|\\*+|(\\\\\\*){{1,3}}|{_PAUSE}|[?!]+|[.=/]"),
        Rule(pattern="'", ahead="[A-Za-z][^ \t\n\r\u00a0]", written=write.always("`")),
        Rule(pattern=f"{_CLITIC}|{_APOSTROPHE}|''|[{quotes}]{{1,2}}", written=write.in_ascii),
        Rule(pattern=f"<<|>>|[\\^%~|\\\\+&{SYMBOL}\u207a\u207b\u208a\u208b\u2044]"),
        Rule(pattern=f"{_SPACE}+|[\0\u200b\u200e\u200f\ufeff\x7f]|&nbsp;", written=write.always("")),
        Rule(pattern=LINE_BREAK, written=write.always("")),
        Rule(pattern="(co|pte|pty)\\.", ahead=f"{_SPACE}(ltd|lim)"),
        Rule(pattern="[^]", written=write.always("")),
    ]


RULES: Sequence[Rule] = [
    Rule(pattern="[cC]\\+\\+|[cCfF]#"),
    *_splits(),
    *_words(),
    *_addresses(),
    *_numbers(),
    *_abbreviations(),
    *_phones_and_faces(),
    *_compounds(),
    *_marks(),
]
