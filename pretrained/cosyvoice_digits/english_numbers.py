"""Whole numbers in English words: `1234` is "one thousand, two hundred and thirty-four"."""

import unicodedata


_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_THOUSANDS = (
    *("", " thousand", " million", " billion", " trillion", " quadrillion", " quintillion", " sextillion"),
    *(" septillion", " octillion", " nonillion", " decillion"),
)


def spell_numbers(text: str) -> str:
    """Every run of digits in words, as the `inflect` package says them, which upstream uses.

    A run ends where `str.isdigit` is false; what is no decimal digit in it (a superscript) is dropped. A number of
    more than 36 digits, which `inflect` refuses, is read digit by digit.
    """
    words: list[str] = []
    run: list[str] = []
    for character in [*text, ""]:
        if character.isdigit():
            run.append(character)
            continue
        if run:
            words.append(number_in_words("".join(run)))
            run = []
        words.append(character)
    return "".join(words)


def number_in_words(digits: str) -> str:
    """One run of digits (of any script) in words; one without decimal digits is "zero"."""
    values = [unicodedata.decimal(character, None) for character in digits]
    plain = "".join(str(value) for value in values if value is not None)
    number = plain.lstrip("0")
    if not number:
        return _ONES[0]
    if len(number) > 3 * len(_THOUSANDS):
        return " ".join(_ONES[int(digit)] for digit in plain)
    groups = [int(number[max(end - 3, 0) : end]) for end in range(len(number), 0, -3)]
    parts = [_below_thousand(group) + _THOUSANDS[power] for power, group in enumerate(groups) if group]
    first, rest = parts[0], parts[1:]
    if rest and 0 < groups[0] < 100:
        # A last group of one word.
        return f"{', '.join(reversed(rest))} and {first}"
    return ", ".join(reversed(parts))


def _below_thousand(number: int) -> str:
    hundreds, rest = divmod(number, 100)
    if rest < 20:
        words = _ONES[rest] if rest else ""
    else:
        words = _TENS[rest // 10] + (f"-{_ONES[rest % 10]}" if rest % 10 else "")
    if not hundreds:
        return words
    return f"{_ONES[hundreds]} hundred" + (f" and {words}" if words else "")
