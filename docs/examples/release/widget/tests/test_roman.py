"""Numerals are written and read."""

from __future__ import annotations

import unittest

from widget import add, from_roman, to_roman
from widget.roman import MAX

NUMERALS = {
    1: "I",
    4: "IV",
    9: "IX",
    14: "XIV",
    40: "XL",
    90: "XC",
    400: "CD",
    1994: "MCMXCIV",
    3999: "MMMCMXCIX",
}
MALFORMED = ("", "IIII", "VX", "IC", "MMMM", "ABC", "xiv", " X")


class Writing(unittest.TestCase):
    """From numbers to numerals."""

    def test_known_numerals(self) -> None:
        for number, numeral in NUMERALS.items():
            self.assertEqual(to_roman(number), numeral)

    def test_every_numeral_is_different(self) -> None:
        self.assertEqual(len({to_roman(number) for number in range(1, MAX + 1)}), MAX)

    def test_no_letter_four_times_in_a_row(self) -> None:
        for number in range(1, MAX + 1):
            self.assertNotRegex(to_roman(number), r"(.)\1\1\1")

    def test_nothing_below_one(self) -> None:
        with self.assertRaises(ValueError):
            to_roman(0)

    def test_nothing_above_the_largest(self) -> None:
        with self.assertRaises(ValueError):
            to_roman(MAX + 1)


class Reading(unittest.TestCase):
    """From numerals to numbers."""

    def test_known_numerals(self) -> None:
        for number, numeral in NUMERALS.items():
            self.assertEqual(from_roman(numeral), number)

    def test_every_number_comes_back(self) -> None:
        for number in range(1, MAX + 1):
            self.assertEqual(from_roman(to_roman(number)), number)

    def test_malformed_numerals_are_refused(self) -> None:
        for numeral in MALFORMED:
            with self.subTest(numeral), self.assertRaises(ValueError):
                from_roman(numeral)


class Adding(unittest.TestCase):
    """Sums."""

    def test_known_sum(self) -> None:
        self.assertEqual(add("XIV", "XXVIII"), "XLII")

    def test_all_sums_of_small_numbers(self) -> None:
        numerals = [to_roman(number) for number in range(1, 501)]
        for first, one in enumerate(numerals, start=1):
            for second, other in enumerate(numerals, start=1):
                self.assertEqual(add(one, other), to_roman(first + second))

    def test_order_does_not_matter(self) -> None:
        numerals = [to_roman(number) for number in range(1, 2000, 5)]
        for one in numerals:
            for other in numerals:
                self.assertEqual(add(one, other), add(other, one))

    def test_grouping_does_not_matter(self) -> None:
        numerals = [to_roman(number) for number in range(1, 1250, 25)]
        for one in numerals:
            for other in numerals:
                for third in numerals:
                    self.assertEqual(add(add(one, other), third), add(one, add(other, third)))

    def test_sum_too_large_is_refused(self) -> None:
        with self.assertRaises(ValueError):
            add(to_roman(MAX), "I")
