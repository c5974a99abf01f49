"""Limits of requests, tokens and money that hold for calls in flight too.

Before a request its upper bound is set aside (prompt tokens at most, max_tokens, their price); afterwards the bound is
given back and what the endpoint reported is booked. A try whose fate is unknown (time-out, dropped connection, unreadable
answer) may have been billed, so its bound stays booked, apart from the rest. Invariant: used + unknown + set aside never
exceeds a limit, as long as no request takes more than its bound. Cost: a few additions a request; one thread only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from longalign_lib.llm.records import BudgetError, Prices

EMPTY = {"requests": 0, "tokens": 0, "cost": 0.0}


@dataclass
class Budget:
    """What may be spent, what is, and what is set aside for requests in flight.

    Attributes:
        max_calls, max_tokens, max_cost: limits of requests, of prompt and completion tokens together, and of money in
            the unit of ``prices``; None is no limit.
        used: requests made, tokens and cost that the endpoint reported. unknown: bounds of tries with an unknown fate.
        held: set aside for requests in flight.
    """

    max_calls: int | None = None
    max_tokens: int | None = None
    max_cost: float | None = None
    prices: Prices | None = None
    used: dict = field(default_factory=EMPTY.copy)
    unknown: dict = field(default_factory=EMPTY.copy)
    held: dict = field(default_factory=EMPTY.copy)

    def __post_init__(self) -> None:
        for name in ("max_calls", "max_tokens", "max_cost"):
            limit = getattr(self, name)
            if limit is not None and not limit >= 0:
                raise ValueError(f"{name.replace('max_tokens', 'max_total_tokens')} must be 0 or more, got {limit!r}")
        if self.max_cost is not None and self.prices is None:
            raise ValueError("max_cost needs prices=(per million prompt tokens, per million completion tokens)")

    @property
    def counts_tokens(self) -> bool:
        """A limit depends on tokens, so requests need a bound."""
        return self.max_tokens is not None or self.max_cost is not None

    def cost(self, prompt: int, completion: int) -> float:
        """The price of that many tokens; 0 without prices."""
        return self.prices.cost(prompt, completion) if self.prices else 0.0

    def book(self, requests: int, prompt: int, completion: int) -> None:
        """Book what was used before this budget began."""
        self.used["requests"] += requests
        self.used["tokens"] += prompt + completion
        self.used["cost"] += self.cost(prompt, completion)

    def reserve(self, prompt: int, completion: int) -> dict | None:
        """Set aside the bound of one request.

        Returns:
            what was set aside, for `settle`; None when it may fit once requests in flight are settled.

        Raises:
            BudgetError: it does not fit, whatever becomes of the requests in flight.
        """
        ask = {"requests": 1, "tokens": prompt + completion, "cost": self.cost(prompt, completion)}
        limits = {"requests": self.max_calls, "tokens": self.max_tokens, "cost": self.max_cost}
        waits = False
        for name, limit in limits.items():
            if limit is None:
                continue
            spent = self.used[name] + self.unknown[name]
            slack = 1e-12 * limit if name == "cost" else 0  # rounding of sums
            # Requests in flight are spent for good; of their tokens and cost, some may come back.
            if spent + ask[name] + (self.held[name] if name == "requests" else 0) > limit + slack:
                raise BudgetError(self._refusal(name, limit, ask[name]))
            waits |= spent + self.held[name] + ask[name] > limit + slack
        if waits:
            return None
        for name, amount in ask.items():
            self.held[name] += amount
        return ask

    def settle(self, held: dict, prompt: int, completion: int, unknown: bool = False) -> None:
        """Give back what was set aside and book what was used (``unknown``: the whole bound, apart)."""
        for name, amount in held.items():
            self.held[name] -= amount
        if unknown:
            self.book(1, 0, 0)
            self.unknown["tokens"] += held["tokens"]
            self.unknown["cost"] += held["cost"]
        else:
            self.book(1, prompt, completion)

    def _refusal(self, name: str, limit: float, ask: float) -> str:
        unit = {"requests": " requests", "tokens": " tokens", "cost": ""}[name]
        knob = {"requests": "max_calls", "tokens": "max_total_tokens", "cost": "max_cost"}[name]
        budget = f"the budget of {limit:,}{unit}" + (" of money" if name == "cost" else "")
        spent, unknown = self.used[name] + self.unknown[name], self.unknown[name]
        if spent + self.held[name] >= limit:
            what = f"{budget} is used up"
        else:
            what = f"{budget} has {max(0, limit - spent):,.6g} left, and this call may take {ask:,.6g} (its upper bound)"
        used = f"used: {self.used['requests']} requests, {self.used['tokens']:,} tokens"
        used += f", cost {self.used['cost']:,.6g}" if self.prices else ""
        used += f", and up to {unknown:,.6g}{unit} for tries without a usable answer" if unknown else ""
        return f"{what} ({used}). Answered calls are kept; raise {knob} and run again to go on"
