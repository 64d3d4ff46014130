"""An optional judge of captions behind an OpenAI-compatible endpoint, on this machine or any other.

Its answers are not trusted: whatever comes back is a mark or a counted failure, and no redirection is followed, so that
the key and the captions go to the configured address alone. Nothing here may hold a training step for long: an answer
has a time limit, all answers of a step have one together, and the threads that wait are left behind when it has passed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dual_loop.config import RewardConfig
from dual_loop.errors import ConfigError, DualLoopError, explain

logger = logging.getLogger("dual_loop")

MAX_ANSWER_BYTES = 1 << 20
REST_AFTER, REST_CALLS = 3, 50
"""After so many calls in a row without any answer the judge is left alone for so many calls."""
BACK_OFF_SECONDS = 0.2
HIGHEST_MARK = 10.0
ANSWER_TOKENS = 32
MARK_SCHEMA = {
    "type": "object",
    "properties": {"mark": {"type": "number", "minimum": 0, "maximum": HIGHEST_MARK}},
    "required": ["mark"],
    "additionalProperties": False,
}
STRUCTURED = {"response_format": {"type": "json_schema", "json_schema": {"name": "mark", "schema": MARK_SCHEMA}}}
REFUSED_REQUEST = (400, 404, 415, 422, 501)
"""How servers answer a ``response_format`` that they do not know; the question is then asked without it, for good."""

PROMPT = (
    "Two people describe the same object of a picture. Reference: {references}. Other: {generated}. "
    "How well does the other description fit the same object? Answer with one number from 0 (another object) to 10 "
    "(certainly the same object), and nothing else."
)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Makes an error of every redirection."""

    def redirect_request(self, *_: object) -> None:
        return None


class JudgeError(DualLoopError):
    """The judge failed and ``reward.judge_failure`` is ``error``."""


@dataclass(frozen=True)
class JudgeQuestion:
    """A generated caption and the captions that it is compared with."""

    generated: str
    references: tuple[str, ...]


class Judge:
    """Asks for marks.

    Attributes:
        counters: ``judge/asked``, ``judge/answered``, ``judge/failed``, ``judge/skipped`` (not asked while it rests).

    Raises:
        ConfigError: the address is no http or https URL, or the variable of the key is not set.
    """

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        parts, base = urllib.parse.urlsplit(config.judge_url or ""), (config.judge_url or "").rstrip("/")
        if parts.scheme not in ("http", "https") or not parts.netloc:
            what, expected = "the judge's address is no URL", "http://HOST:PORT/v1"
            raise ConfigError(explain(what, "reward.judge_url", config.judge_url, expected, "set --judge_url"))
        self.url = base if base.endswith("/chat/completions") else f"{base}/chat/completions"
        self._headers = {"Content-Type": "application/json"}
        if config.judge_key_variable is not None:
            key, where = os.environ.get(config.judge_key_variable), f"environment variable {config.judge_key_variable}"
            if not key:
                fix = "export it, or leave reward.judge_key_variable out"
                raise ConfigError(explain("the judge's key is not set", where, fix=fix))
            self._headers["Authorization"] = f"Bearer {key}"
        self.counters = dict.fromkeys(("judge/asked", "judge/answered", "judge/failed", "judge/skipped"), 0)
        self._failed_in_a_row, self._resting = 0, 0
        self._has_warned, self._is_structured = False, True
        self._open = urllib.request.build_opener(_NoRedirect).open

    def check(self) -> None:
        """Ask one question, so that a wrong address shows before training does.

        Raises:
            JudgeError: no answer came, and the policy is ``error``; under ``skip`` this is a warning.
        """
        answer, problem = self._ask_all([JudgeQuestion("a red circle", ("the red circle",))])
        if answer[0] is None:
            self._fail(problem or "no answer")

    def ask(self, questions: Sequence[JudgeQuestion]) -> list[float | None]:
        """Return a mark in 0..1 for each question, None where there was none in time.

        Raises:
            JudgeError: an answer failed, and the policy is ``error``.
        """
        if not questions:
            return []
        if self._resting > 0:
            self._resting -= 1
            self.counters["judge/skipped"] += len(questions)
            return [None] * len(questions)
        marks, problem = self._ask_all(questions)
        answered = sum(mark is not None for mark in marks)
        for name, count in (("asked", len(questions)), ("answered", answered), ("failed", len(questions) - answered)):
            self.counters[f"judge/{name}"] += count
        self._failed_in_a_row = 0 if answered else self._failed_in_a_row + 1
        if self._failed_in_a_row >= REST_AFTER:
            self._failed_in_a_row, self._resting = 0, REST_CALLS
        if answered < len(questions):
            self._fail(problem or "no answer in time")
        return marks

    def _ask_all(self, questions: Sequence[JudgeQuestion]) -> tuple[list[float | None], str | None]:
        """Ask in parallel until the deadline; threads that still wait then are abandoned (they are daemons)."""
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, float | None, str | None]] = queue.SimpleQueue()
        for index in range(len(questions)):
            waiting.put(index)
        deadline = time.monotonic() + self.config.judge_deadline

        def work() -> None:
            while time.monotonic() < deadline:
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                done.put((index, *self._ask_one(questions[index], deadline)))

        for _ in range(min(self.config.judge_workers, len(questions))):
            threading.Thread(target=work, daemon=True, name="judge").start()
        marks: list[float | None] = [None] * len(questions)
        problem = None
        for _ in questions:
            try:
                index, marks_index, reason = done.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return marks, problem or f"not all answers within {self.config.judge_deadline:g} s"
            marks[index], problem = marks_index, problem or reason
        return marks, problem

    def _ask_one(self, question: JudgeQuestion, deadline: float) -> tuple[float | None, str | None]:
        content = PROMPT.format(references=" | ".join(question.references), generated=question.generated)
        messages = [{"role": "user", "content": content}]
        settings = {"model": self.config.judge_model, "temperature": 0, "max_tokens": ANSWER_TOKENS}
        reason: str | None = None
        for attempt in range(self.config.judge_retries + 1):
            seconds = min(deadline - time.monotonic(), self.config.judge_timeout)
            if seconds <= 0:
                break
            try:
                return self._request({**settings, "messages": messages}, seconds), None
            except Exception as error:
                # OSError: refused connections, HTTP errors, time-outs; the others are what an answer made of HTTP, JSON
                # (RecursionError) or the mark. Nothing that a server sends may end a thread.
                reason = f"{type(error).__name__}: {error}"[:200]
            time.sleep(min(BACK_OFF_SECONDS * 2**attempt, max(0.0, deadline - time.monotonic())))
        return None, reason

    def _request(self, question: Mapping[str, object], seconds: float) -> float:
        is_structured, limit, answer = self._is_structured, time.monotonic() + seconds, b""
        body = json.dumps({**question, **(STRUCTURED if is_structured else {})}).encode()
        try:
            with self._open(urllib.request.Request(self.url, body, self._headers), timeout=seconds) as response:
                # Of bounded size and in bounded time, also from a server that sends a byte now and then.
                while chunk := response.read1(65536):
                    answer += chunk
                    if len(answer) > MAX_ANSWER_BYTES:
                        raise ValueError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
                    if time.monotonic() > limit:
                        raise TimeoutError("the answer took too long")
        except urllib.error.HTTPError as error:
            if not is_structured or error.code not in REFUSED_REQUEST:
                raise
            self._is_structured = False
            return self._request(question, limit - time.monotonic())
        return parse_mark(str(json.loads(answer)["choices"][0]["message"]["content"]))

    def _fail(self, problem: str) -> None:
        message = explain(
            "the judge of captions does not answer",
            where=self.url,
            seen=problem,
            expected="an OpenAI-compatible server that answers with one number from 0 to 10",
            fix="start it, check --judge_url, raise reward.judge_timeout, or leave --judge_url out",
        )
        if self.config.judge_failure == "error":
            raise JudgeError(message)
        if not self._has_warned:
            self._has_warned = True
            logger.warning("Warning: %s; going on without its marks where it fails, counted as judge/failed", message)


def parse_mark(text: str) -> float:
    """Return the mark (0..1) in an answer: one number from 0 to 10, also ``8/10``, ``8.`` or ``{"mark": 8}``.

    Raises:
        ValueError: the answer is anything else.
    """
    number = r"(\d{1,2}(?:\.\d+)?)"
    match = re.fullmatch(rf'\s*(?:{number}\s*(?:/\s*10)?\s*\.?|\{{\s*"mark"\s*:\s*{number}\s*\}})\s*', text)
    mark = float(match[1] or match[2]) if match else math.inf
    if mark > HIGHEST_MARK:
        raise ValueError(f"the answer is no number from 0 to 10: {text[:60]!r}")
    return mark / HIGHEST_MARK
