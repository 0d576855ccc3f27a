"""Abbreviations that keep their dot, as patterns of `tasks.metrics.patterns`; in brackets what must be written so."""

from __future__ import annotations

__all__ = [
    "BEFORE_LOWER_CASE",
    "BEFORE_NUMBERS",
    "BEFORE_UPPER_CASE",
    "FILE_ENDINGS",
    "HYPHENATED_INITIALS",
    "INITIALS",
    "SENTENCE_OPENERS",
]


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
