"""Stop strings in a text that comes in pieces. It knows characters only, no tokens.

The text ends with the first stop string to be completed (of several completed by one character, the longest), so the
result does not depend on how the text is cut into pieces. One step per character, whatever the number of strings:
A. Aho and M. Corasick, Efficient string matching, 1975.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopAutomaton:
    """The trie of the stop strings with its failure links; shared by the samples of a request.

    State 0 is the root. ``depths[s]`` is the length of state s's string, which is the longest suffix of the text
    read that begins a stop string; ``matches[s]`` is the length of the longest stop string that ends here, or 0.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.children: list[dict[str, int]] = [{}]
        self.depths = [0]
        self.matches = [0]
        self.failures = [0]
        for string in strings:
            self._add(string)
        self._link()

    def step(self, state: int, char: str) -> int:
        """The state after ``char``."""
        while state and char not in self.children[state]:
            state = self.failures[state]
        return self.children[state].get(char, 0)

    def _add(self, string: str) -> None:
        state = 0
        for char in string:
            if char not in self.children[state]:
                self.children[state][char] = len(self.children)
                self.children.append({})
                self.depths.append(self.depths[state] + 1)
                self.matches.append(0)
                self.failures.append(0)
            state = self.children[state][char]
        self.matches[state] = len(string)

    def _link(self) -> None:
        """Breadth first: a failure link leads to a shorter string, whose own links are then ready."""
        queue = deque(self.children[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self.children[state].items():
                self.failures[child] = self.step(self.failures[state], char)
                self.matches[child] = self.matches[child] or self.matches[self.failures[child]]
                queue.append(child)


class StopMatcher:
    """Passes on text until a stop string is complete, and holds back what may still become one."""

    def __init__(self, automaton: StopAutomaton) -> None:
        self.stopped = False
        """A stop string was completed: nothing more will be passed on."""
        self._automaton = automaton
        self._state = 0
        self._held = ""

    def push(self, text: str, *, active: bool = True) -> str:
        """The text that may be shown after ``text`` came in.

        While not ``active``, stop strings that are completed do not count; one that begins here and is completed
        later does.
        """
        if self.stopped:
            return ""
        automaton = self._automaton
        if not automaton.children[0]:
            return text
        seen = self._held + text
        for position, char in enumerate(text, start=len(self._held) + 1):
            self._state = automaton.step(self._state, char)
            match = automaton.matches[self._state]
            if match and active:
                self.stopped = True
                self._held = ""
                return seen[: position - match]
            if match and not automaton.children[self._state]:
                self._state = automaton.failures[self._state]
        start = len(seen) - automaton.depths[self._state]
        self._held = seen[start:]
        return seen[:start]

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held
