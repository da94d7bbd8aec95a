"""Sample a target's responses from a server that speaks the OpenAI protocol: SGLang, vLLM, others.

A response is one chat completion. Transient errors (a lost connection, a hanging request, statuses
408, 409, 425, 429 and 5xx, an aborted response) are retried after a growing, jittered pause, and
not before Retry-After. A prompt that the server refuses is named with the reason.

The sampled token ids become ``response_ids``, because the tokens of a text are often others than
those that were sampled. vLLM returns them where a request has ``return_token_ids``; SGLang 0.5.14
ignores that, and returns them beside the log-probabilities in ``meta_info``. Both engines take
sampling settings that a request leaves out from the target's generation_config.json, such as a
top_k of 20, so requests name them all.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx

from specforge_lk.data.messages import Message
from specforge_lk.data.responses import Prompt, Request, conversation_row, messages_of
from specforge_lk.data.tool_calls import tools_in
from specforge_lk.serving import Sampling

_T = TypeVar("_T")

#: Seconds of the first pause before a retry; each pause is double the one before.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0
#: Statuses that are retried, beside all from 500.
_TRANSIENT = {408, 409, 425, 429}
#: Statuses of a wrong request: a prompt that is too long, for example.
_REFUSED = {400, 413, 422}
#: Extensions of the protocol by SGLang and vLLM, which return token ids and change the distribution
#: no further. top_k is one, too.
_EXTENSIONS = {
    "return_token_ids": True,
    "logprobs": True,
    "return_meta_info": True,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}


class ServerError(ValueError):
    """The server cannot be used; the message says why."""


class RefusedPrompt(ServerError):
    """The server does not take a prompt; the message names it and gives the server's reason."""


class TransientError(Exception):
    """The request is worth retrying, after ``retry_after`` seconds if the server gave a number."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Server:
    """A server and how it is used.

    Attributes:
        url: Its address, with or without the ``/v1`` that paths of the protocol begin with.
        api_key: Sent as bearer token.
        concurrency: Most requests under way at once.
        timeout: Seconds that one attempt may take as a whole, from connecting to the last byte.
        retries: How often a request is retried.
        extensions: Send what SGLang and vLLM have beyond the OpenAI protocol.
        note: Called with a line about each retry and its reason.
    """

    url: str
    api_key: str | None = None
    concurrency: int = 64
    timeout: float = 600.0
    retries: int = 10
    extensions: bool = True
    note: Callable[[str], None] = lambda text: None

    def only_model(self) -> str:
        """Return the name of the only model that is served.

        Raises:
            ServerError: there are several, or the server cannot be used.
        """

        async def ask() -> dict[str, Any]:
            async with self._client() as client:
                return await self._with_retries(
                    "models", lambda: self._call(client, "GET", "models")
                )

        try:
            names = [model["id"] for model in asyncio.run(ask())["data"]]
        except (KeyError, TypeError) as error:
            raise ServerError(f"{self.url} does not say which models it serves") from error
        if len(names) != 1:
            raise ServerError(f"{self.url} serves {', '.join(names) or 'no model'}: name one")
        return names[0]

    def respond(
        self,
        model: str,
        prompts: Sequence[Prompt],
        request: Request,
        *,
        save: Callable[[list[dict[str, Any]]], None],
        advance: Callable[[int, int], None] = lambda tokens, budget: None,
        refused: Callable[[RefusedPrompt], None] | None = None,
    ) -> None:
        """Sample one response to each prompt.

        Args:
            model: The server's name of the target.
            prompts: Rows ``{"id", "prompt"}`` or ``{"id", "messages"}``.
            request: Sampling, length and seed.
            save: Called with conversation rows, in the order in which they are done.
            advance: Called with the tokens of a response, and the budget of ``max_new_tokens``.
            refused: Called with prompts that the server refuses; by default the first one is an
                error.

        Raises:
            ServerError: a prompt is refused and there is no ``refused``, or fails ``retries`` + 1
                times in a row. Responses that were complete before are saved.
        """
        asyncio.run(self._respond(model, prompts, request, save, advance, refused))

    async def _respond(
        self,
        model: str,
        prompts: Sequence[Prompt],
        request: Request,
        save: Callable[[list[dict[str, Any]]], None],
        advance: Callable[[int, int], None],
        refused: Callable[[RefusedPrompt], None] | None,
    ) -> None:
        done: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        todo = iter(prompts)

        async def work(client: httpx.AsyncClient) -> None:
            for prompt in todo:  # shared by all workers: each takes the next prompt
                body = self._body(model, prompt, request)

                async def attempt(prompt: Prompt = prompt, body: dict = body) -> tuple[dict, int]:
                    reply = await self._call(client, "POST", "chat/completions", body)
                    asked = request.sampling if self.extensions else None
                    return _row(prompt, reply, asked, request.chat_template_args)

                tokens = 0
                try:
                    row, tokens = await self._with_retries(f"prompt {prompt['id']!r}", attempt)
                    done.put_nowait(row)
                except RefusedPrompt as error:
                    if refused is None:
                        raise ServerError(
                            f"{error}; --skip-refused leaves such prompts out, --no-extensions "
                            "what is not of the OpenAI protocol"
                        ) from None
                    refused(error)
                advance(tokens, request.max_new_tokens)

        async def write() -> None:
            # One flush to disk for all responses that are complete by then.
            while True:
                save([await done.get(), *_drained(done)])

        try:
            async with self._client() as client, asyncio.TaskGroup() as outer:
                writer = outer.create_task(write())
                async with asyncio.TaskGroup() as inner:
                    for _ in range(min(self.concurrency, len(prompts))):
                        inner.create_task(work(client))
                writer.cancel()
        except BaseExceptionGroup as group:
            raise _first(group) from None
        finally:
            if rest := _drained(done):
                save(rest)

    @contextlib.asynccontextmanager
    async def _client(self) -> AsyncIterator[httpx.AsyncClient]:
        try:
            known = httpx.URL(self.url).scheme in ("http", "https")
        except httpx.InvalidURL as error:
            raise ServerError(f"{self.url} is no address of a server: {error}") from error
        if not known:
            raise ServerError(f"{self.url!r} is no http:// or https:// address")
        base = self.url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx.Limits(max_connections=self.concurrency)
        # No timeout here: _with_retries has one deadline for a whole attempt.
        async with httpx.AsyncClient(
            base_url=f"{base}/v1", headers=headers, limits=limits, timeout=None
        ) as client:
            yield client

    def _body(self, model: str, prompt: Prompt, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        body = {
            "model": model,
            "messages": _in_protocol(messages_of(prompt)),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": request.max_new_tokens,
            "seed": request.number(prompt["id"]) >> 32,  # some servers take 32 bits
        }
        if (tools := tools_in(prompt)) is not None:
            body["tools"] = tools
        if request.chat_template_args:
            body["chat_template_kwargs"] = dict(request.chat_template_args)
        return {**body, **_EXTENSIONS, "top_k": sampling.top_k or -1} if self.extensions else body

    async def _with_retries(self, what: str, attempt: Callable[[], Awaitable[_T]]) -> _T:
        """Retry transient errors up to ``retries`` times."""
        retry = 0
        while True:
            retry += 1
            try:
                async with asyncio.timeout(self.timeout):
                    return await attempt()
            except TimeoutError:
                failure = TransientError(f"no response within {self.timeout:g} s")
            except TransientError as error:
                failure = error
            except RefusedPrompt as error:
                raise RefusedPrompt(f"{what} was refused by {self.url}: {error}") from None
            if retry > self.retries:
                raise ServerError(
                    f"{what}: {failure}, {retry} times in a row, from {self.url}; see to the "
                    "server and run the same command again: complete responses are kept"
                )
            # The jitter spreads the requests that a restarting server would meet all at once.
            backoff = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (retry - 1)) * random.uniform(0.5, 1)
            pause = failure.retry_after + backoff
            self.note(f"{what}: {failure}; retried in {pause:.1f} s")
            await asyncio.sleep(pause)

    async def _call(
        self, client: httpx.AsyncClient, method: str, path: str, body: dict | None = None
    ) -> dict[str, Any]:
        """Send one request and return the JSON object of its answer."""
        try:
            response = await client.request(method, path, json=body)
        except httpx.RequestError as error:
            raise TransientError(f"{type(error).__name__} ({error})") from error
        status = response.status_code
        if status in _TRANSIENT or status >= 500:
            raise TransientError(f"status {status}", _retry_after(response))
        if status in _REFUSED:
            raise RefusedPrompt(f"status {status}, {response.text[:500]}")
        if not response.is_success:
            raise ServerError(
                f"{response.url}: status {status}, {response.text[:500]}; check --server, --target "
                "and --api-key"
            )
        try:
            return response.json()
        except ValueError as error:
            raise TransientError("an answer that is not JSON") from error


def _row(
    prompt: Prompt,
    reply: dict[str, Any],
    asked: Sampling | None,
    chat_template_args: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], int]:
    """Return a conversation row from a chat completion, and how many tokens were sampled.

    Args:
        prompt: The prompt.
        reply: The answer of the server.
        asked: What the request asked to be sampled from; None where it left a part of that to the
            server. Only token ids show that a server heeds what is not of the OpenAI protocol.
        chat_template_args: What the request gave the chat template.
    """
    try:
        choice = reply["choices"][0]
        message, reason = choice["message"], choice["finish_reason"]
    except (KeyError, IndexError, TypeError) as error:
        raise TransientError("an answer without a chat completion") from error
    if reason not in ("stop", "length", "tool_calls"):
        raise TransientError(f"finish_reason {reason!r}")
    text: str | Message = message.get("content") or ""
    ids = _token_ids(choice)
    if message.get("tool_calls"):
        text = {"role": "assistant", "content": text, "tool_calls": message["tool_calls"]}
    if ids is None and (message.get("reasoning_content") or message.get("reasoning")):
        raise ServerError(
            f"prompt {prompt['id']!r}: the server takes thoughts out of the response and gives no "
            "token ids, so what was sampled is not known; start it without a reasoning parser, or "
            "use SGLang or vLLM with extensions"
        )
    finished = reason != "length"
    if ids is not None:
        end = choice.get("matched_stop")  # SGLang's name of the token that ended the response
        if finished and isinstance(end, int) and ids[-1:] != [end]:
            ids = [*ids, end]
    usage = reply.get("usage") or {}
    tokens = len(ids) if ids is not None else usage.get("completion_tokens") or 0
    sampling = asked if ids is not None else None
    if sampling and sampling.top_k and sampling.top_p < 1 and "meta_info" in choice:
        sampling = None  # SGLang takes top-p of all tokens, not of what top-k has left
    return conversation_row(prompt, text, finished, ids, sampling, chat_template_args), tokens


def _in_protocol(messages: Sequence[Message]) -> list[Message]:
    """Return messages as the protocol has them: arguments of tool calls are text."""

    def call(found: dict[str, Any]) -> dict[str, Any]:
        inner = found.get("function", found)
        text = json.dumps(inner["arguments"], ensure_ascii=False)
        return {"type": "function", **found, "function": {**inner, "arguments": text}}

    sent = []
    for message in messages:
        message = {key: value for key, value in message.items() if key != "weight"}
        if "tool_calls" in message:
            message["tool_calls"] = [call(found) for found in message["tool_calls"]]
        sent.append(message)
    return sent


def _token_ids(choice: dict[str, Any]) -> list[int] | None:
    """Return the sampled tokens of a choice; None if the server does not say."""
    if (ids := choice.get("token_ids")) is not None:
        return ids
    # Rows of log-probability, token id and text.
    logged = (choice.get("meta_info") or {}).get("output_token_logprobs")
    return [row[1] for row in logged] if logged else None


def _retry_after(response: httpx.Response) -> float:
    """Return the seconds of a Retry-After header, which has a number or a date; 0 without one."""
    value = response.headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def _drained(queue: asyncio.Queue[dict[str, Any]]) -> list[dict[str, Any]]:
    return [queue.get_nowait() for _ in range(queue.qsize())]


def _first(error: BaseException) -> BaseException:
    """Return the first exception in nested groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


__all__ = ["RefusedPrompt", "Server", "ServerError"]
