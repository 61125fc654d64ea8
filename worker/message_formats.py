"""Which formats of tool calls and reasoning a worker reads, and how the output of each job is read."""

from collections.abc import Sequence

from ingine.contract.jobs import Job
from ingine.engine.message_format import MessageFormat
from ingine.engine.parsers.choice import ModelFormats, checked_formats, formats_of
from ingine.engine.text.conversation import Conversation
from ingine.engine.text.message_request import message_format
from ingine.engine.text.tokenizer import Tokenizer
from ingine.worker.hosting.engine_link import EngineHost
from ingine.worker.settings import WorkerSettings

PROMPT_END = 256
"""Last tokens of a prompt in which an opening tag of reasoning is looked for. Behind it is white space, which
may be as long as the prompt."""


def worker_formats(engine: EngineHost, settings: WorkerSettings) -> ModelFormats | None:
    """Return the formats that the settings name, or else those of the model. None if the model has no
    tokenizer: it takes no messages. Raises ConfigError for an unknown name.
    """
    if engine.tokenizer is None:
        return None
    own = formats_of(engine.model_type, engine.tokenizer.chat_template)
    reasoning = own.reasoning if settings.reasoning_parser is None else settings.reasoning_parser
    return checked_formats(
        settings.tool_parser or own.tool_format, None if reasoning == "none" else reasoning
    )


def format_names(settings: WorkerSettings) -> list[str]:
    """Return names of the parsers that the settings name, for the fingerprint: the message of a job, and so
    its events, depend on them.
    """
    named = {"tools": settings.tool_parser, "reasoning": settings.reasoning_parser}
    return [f"{kind}-{name}" for kind, name in named.items() if name is not None]


def job_format(
    formats: ModelFormats, job: Job, prompt_token_ids: Sequence[int], tokenizer: Tokenizer
) -> MessageFormat | None:
    """Return how the output of a job with messages is read. None: it is text alone.

    It is the same in every attempt. Raises InvalidRequest for tools that cannot be called.
    """
    choice, last = job.tool_choice, job.messages[-1]
    conversation = Conversation(
        [last.model_dump(exclude_none=True)],  # the others say nothing about the output, and may be many
        job.tools,
        continue_final_message=job.continue_final_message,
    )
    return message_format(
        formats,
        conversation,
        prompt_token_ids[-PROMPT_END:],
        tokenizer,
        tool_choice=choice if choice is None or isinstance(choice, str) else choice.model_dump(),
        key=job.id,
    )
