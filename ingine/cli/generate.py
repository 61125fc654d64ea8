"""The command `ingine generate`."""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ingine.cli.chat_options import Schema, ToolChoice, Tools, chat_fields, with_schema
from ingine.cli.message_output import MessagePrinter, print_choice, print_message
from ingine.cli.options import Sampling, sampling_fields
from ingine.engine.store.model_store import DEFAULT_MODEL
from ingine.terminal import echo
from ingine.worker.frozen_imports import frozen_imports

if TYPE_CHECKING:
    from ingine.engine.llm import LLM
    from ingine.engine.message_format import MessageFormat
    from ingine.engine.outputs import CompletionOutput, SeqOutput
    from ingine.sampling_params import SamplingParams


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt. Default: standard input.")] = None,
    model: Annotated[
        str, typer.Option(help="A packaged model's name, a folder, a GGUF file or a hub id.")
    ] = DEFAULT_MODEL,
    chat: Annotated[
        bool,
        typer.Option("--chat/--raw", help="Apply the model's chat template to the prompt, or use it as is."),
    ] = True,
    n: Annotated[
        int | None, typer.Option(help="Number of outputs. Several are printed when all have ended.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Maximum number of output tokens.", show_default="the rest of the model's length"),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Keep the likeliest tokens that have this probability together.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same tokens.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text. May be repeated.")] = None,
    sampling: Sampling = None,
    schema: Schema = None,
    tools: Tools = None,
    tool_choice: ToolChoice = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole result as one JSON object at the end.")
    ] = False,
) -> None:
    """Generate on this machine, without a server or worker. The text appears as it is generated, but with
    --tools when it is complete.

    Content is printed on standard output, behind it each call of a function as a line of JSON, and reasoning
    on standard error.

    Sampling options that are not given come from the model's generation_config.json, else they have vLLM's
    neutral values, such as temperature 1.

    echo "Why is the sky blue?" | ingine generate
    """
    from pydantic import ValidationError

    from ingine.sampling_params import SamplingParams

    fields = sampling_fields(
        sampling,
        n=n,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop or None,
    )
    fields, of_chat = with_schema(fields, schema), chat_fields(tools, tool_choice, chat=chat)
    prompt = _prompt_or_stdin(prompt)
    try:
        params = SamplingParams(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise typer.BadParameter(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    with frozen_imports():  # loads torch
        from ingine.engine.llm import LLM

    llm = LLM(model)
    params = llm.engine.limits.with_defaults(params)
    messages = [{"role": "user", "content": prompt}]
    if as_json or of_chat or params.n > 1:
        output = llm.chat(messages, params, **of_chat)[0] if chat else llm.generate(prompt, params)[0]
        if as_json:
            echo(json.dumps(asdict(output)))
        elif params.n == 1:
            print_message(_message(output.outputs[0]))
        else:
            for choice in output.outputs:
                print_choice(choice.index, _message(choice))
        cut = [choice for choice in output.outputs if choice.finish_reason == "length"]
        is_cut, num_tokens = bool(cut), max((len(choice.token_ids) for choice in cut), default=0)
    else:
        token_ids, message_format = (_chat_prompt if chat else _raw_prompt)(llm, prompt, params)
        last = _stream(llm, token_ids, params, message_format)
        is_cut, num_tokens = last.finish_reason == "length", last.position
    if is_cut:
        echo(f"ingine: the output was cut at {num_tokens} tokens (finish_reason: length)", err=True)


def _prompt_or_stdin(prompt: str | None) -> str:
    if prompt is None:
        if sys.stdin.isatty():
            raise typer.BadParameter("no prompt: give one as an argument, or pipe one in")
        prompt = sys.stdin.buffer.read().decode("utf-8", "replace").removesuffix("\n")
    return prompt


def _message(choice: "CompletionOutput") -> dict[str, Any]:
    return choice.message or {"role": "assistant", "content": choice.text}


def _raw_prompt(llm: "LLM", prompt: str, params: "SamplingParams") -> tuple[list[int], None]:
    return llm.encoder_for(params).encode(prompt), None


def _chat_prompt(
    llm: "LLM", prompt: str, params: "SamplingParams"
) -> tuple[list[int], "MessageFormat | None"]:
    """Return the tokens of a chat, and how its output is read as a message. None: all of it is content."""
    from ingine.engine.parsers.choice import formats_of
    from ingine.engine.text.conversation import Conversation
    from ingine.engine.text.message_request import message_format
    from ingine.engine.text.tokenizer import required

    conversation = Conversation([{"role": "user", "content": prompt}])
    token_ids = llm.encoder_for(params).encode_chat(conversation)
    tokenizer = required(llm.engine.tokenizer)
    formats = formats_of(llm.engine.model_config.model_type, tokenizer.chat_template)
    return token_ids, message_format(formats, conversation, token_ids, tokenizer)


def _stream(
    llm: "LLM", prompt_token_ids: list[int], params: "SamplingParams", message_format: "MessageFormat | None"
) -> "SeqOutput":
    """Print the message as it is generated. Returns the last output, which has the finish reason."""
    from ingine.engine.request import EngineRequest

    engine, printer = llm.engine, MessagePrinter()
    prompt_token_ids = engine.limits.truncate(prompt_token_ids, params)
    engine.limits.validate(prompt_token_ids, params)
    if params.structured_outputs is not None:
        engine.grammars.compile(params.structured_outputs)
    engine.add(EngineRequest("generate", prompt_token_ids, params, message=message_format))
    while engine.has_unfinished:
        for output in engine.step():
            if message_format is None:
                printer.add({"content": output.text + output.final_text})
            for delta in (output.delta, output.final_delta):
                printer.add({} if delta is None else delta.to_openai())
    printer.end_line()
    return output
