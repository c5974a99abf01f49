"""One chat client for any OpenAI-compatible endpoint (the local one to point it at is in `serve`).

    client = ChatClient("http://127.0.0.1:8000/v1", "my-model", cache="answers.jsonl", max_cost=5, prices=(0.15, 0.60))
    print(client.estimate(requests))           # calls, tokens and cost, without asking anything
    replies = client.chat_many(requests)       # a Reply or a ChatError for each, with a bar that shows the cost so far
    reply = client.chat(messages)              # one question, from a script or from a notebook
    reply = await client.achat(messages)       # the same from async code; in a notebook `await` stands in a cell as it is

`client` asks, `cache` keeps answers, `retry` says what is tried again, `budget` what may still be spent, `records` what
goes in and comes out. An answer is on disk before anyone sees it, so that a rerun after a kill repeats no answered call.
"""

from longalign_lib.llm.client import ChatClient
from longalign_lib.llm.records import BudgetError, ChatError, EmptyReplyError, Estimate, Prices, Reply, Request
from longalign_lib.serve import ServerError, serve_local

__all__ = [
    "BudgetError", "ChatClient", "ChatError", "EmptyReplyError", "Estimate", "Prices", "Reply", "Request", "ServerError",
    "serve_local",
]  # fmt: skip
