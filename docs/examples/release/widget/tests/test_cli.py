"""The command line."""

from __future__ import annotations

import unittest

from widget import __version__
from widget.__main__ import answer


class Answers(unittest.TestCase):
    """What the program prints."""

    def test_number(self) -> None:
        self.assertEqual(answer(["1994"]), "MCMXCIV")

    def test_numeral(self) -> None:
        self.assertEqual(answer(["MCMXCIV"]), "1994")

    def test_sum(self) -> None:
        self.assertEqual(answer(["XIV", "+", "XXVIII"]), "XLII")

    def test_version(self) -> None:
        self.assertEqual(answer(["--version"]), __version__)

    def test_anything_else_is_refused(self) -> None:
        for words in ([], ["X", "-", "V"], ["hello"]):
            with self.subTest(words), self.assertRaises(ValueError):
                answer(words)
