"""What makes a verb of a declaration: its options, its examples, and the way from a failure to an exit code."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import ArgumentInfo

from compress.cli.complete import completer
from compress.cli.examples import examples
from compress.cli.options import NamedModel, Shared
from compress.cli.usage import WrongUsage, usage_error
from compress.errors import CompressError, UsageError, choose
from compress.pipelines.settings import Common
from compress.stopping import Stop, Stopped

if TYPE_CHECKING:
    from compress.pipelines.team import Team

PROGRAM = "compress"
HELP = ("-h", "--help")
ORDER = (
    "plan",
    "init",
    "prune",
    "align",
    "quantize",
    "train",
    "recover",
    "generate",
    "eval",
    "report",
    "export",
    "verify",
    "run",
    "bench",
    "doctor",
)
"""The verbs as ``--help`` lists them: along the chain, then what looks at it."""
KEEP_NOTHING = ("plan", "init", "generate", "report", "export", "verify", "bench", "doctor")
"""Verbs without finished steps that an interruption would leave behind."""


class _UnknownVerb(UsageError):
    """The first word is no verb."""


class _Verb(TyperCommand):
    """A verb, whose help ends with examples."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        formatter.write(examples(str(ctx.info_name), shutil.get_terminal_size().columns))


class _Verbs(TyperGroup):
    """The verbs in the order of ``ORDER``; wrong usage is reported as every other failure is."""

    def list_commands(self, ctx: Any) -> list[str]:
        known = {name: place for place, name in enumerate(ORDER)}
        return sorted(super().list_commands(ctx), key=lambda name: known.get(name, len(known)))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if not (args[0] in self.commands or args[0].startswith("-") or ctx.resilient_parsing):
            raise _UnknownVerb(f"There is no command {args[0]!r}.", choose(args[0], self.list_commands(ctx)))
        return super().resolve_command(ctx, args)

    def main(self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **more: Any) -> Any:  # type: ignore[override]
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **more)
        asked = self._help_of_verb(sys.argv[1:] if args is None else list(args))
        if asked is not None:
            typer.echo(asked)
            sys.exit(0)
        try:
            code = super().main(args, standalone_mode=False, **more)
        except WrongUsage as error:
            refused = usage_error(error)
            if refused is None:  # `compress` alone: the help is out already
                sys.exit(2)
            complain(refused.cause, refused.remedy)
            sys.exit(refused.exit_code)
        except _UnknownVerb as error:
            complain(error.cause, error.remedy)
            sys.exit(error.exit_code)
        sys.exit(code if isinstance(code, int) else 0)

    def _help_of_verb(self, args: list[str]) -> str | None:
        """The help of the verb that ``args`` ask it of, without reading its options; None: they ask for something else.

        Reading them loads what converts values, which takes longer than all the rest of a help.
        """
        before = args[: args.index("--")] if "--" in args else args
        command = self.commands.get(args[0]) if args else None
        if command is None or not set(HELP) & set(before) or f"_{PROGRAM.upper()}_COMPLETE" in os.environ:
            return None
        above = typer.Context(self, info_name=PROGRAM, **self.context_settings)
        return typer.Context(command, info_name=args[0], parent=above).get_help()


app = typer.Typer(
    name=PROGRAM,
    cls=_Verbs,
    help="Make language models small and keep them good: prune, quantize, train small, recover onto the full model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": list(HELP)},
    epilog="Start with: compress prune --ratio 0.5, compress quantize --budget 2.75bit, compress recover, "
    "compress eval",
)


def verb(
    name: str, *shared: Shared, supply: Callable[[], Mapping[str, Any]] = dict
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a declaration: its own options, then the shared ones, all handed to ``execute``.

    Args:
        name: What it is called.
        shared: Groups of options it takes beside its own.
        supply: Called when the command runs, for what the pipeline needs to know of the command line.
    """

    def register(declaration: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=annotation)
            for (parameter, annotation) in zip(
                inspect.signature(declaration).parameters.values(),
                get_type_hints(declaration, include_extras=True).values(),
                strict=False,
            )
        ]
        for parameter in own:
            (info,) = parameter.annotation.__metadata__
            info.autocompletion = info.autocompletion or completer(name, parameter.name)
        named = any(
            parameter.name == "model" and isinstance(parameter.annotation.__metadata__[0], ArgumentInfo)
            for parameter in own
        )
        if named:
            own.append(
                inspect.Parameter(
                    "named_model", inspect.Parameter.KEYWORD_ONLY, annotation=NamedModel, default=None
                )
            )
        more = [
            inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
            for group in shared
            for option, (annotation, default) in group.options.items()
        ]

        def command(**values: Any) -> None:
            if named:
                values["model"] = _one_model(values["model"], values.pop("named_model"))
            execute(name, {**values, **supply()})

        signature = inspect.Signature([*own, *more])
        command.__doc__ = declaration.__doc__
        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        app.command(name, cls=_Verb)(command)
        return declaration

    return register


def _one_model(argument: str | None, option: str | None) -> str | None:
    """The model of a verb that takes it both ways."""
    if argument is not None and option not in (None, argument):
        complain(f"Two models are given, {argument} and {option}.", "Give one, as argument or with --model.")
        raise typer.Exit(2)
    return argument or option


def _common(values: Mapping[str, Any]) -> Common:
    return Common(**{name: values[name] for name in Common.__dataclass_fields__ if name in values})


def execute(verb: str, values: dict[str, Any]) -> None:
    """Run one verb, in this process and in those that were launched beside it."""
    from compress.pipelines.launch import launched

    if not launched():
        _execute(verb, values, None)
        return
    from compress.pipelines.launch import join

    try:
        launch = join()
    except CompressError as error:
        complain(error.cause, error.remedy)
        raise typer.Exit(error.exit_code) from None
    if launch.rank > 0:
        from compress.pipelines.serve import serve

        raise typer.Exit(serve(launch))
    from compress.pipelines.team import Team

    team, code = Team(launch), 1
    try:
        _execute(verb, values, team)
        code = 0
    except typer.Exit as end:
        code = end.exit_code
        raise
    finally:
        team.end(code)


def _execute(verb: str, values: dict[str, Any], team: Team | None) -> None:
    """Run one verb; map every failure to one sentence of cause, one of remedy and an exit code."""
    as_json, debug = values.pop("json_"), values.pop("debug")
    given = {name: value for name, value in values.items() if name not in Common.__dataclass_fields__}
    stop = Stop(_notice)
    try:
        from compress.pipelines.dispatch import run_verb

        with stop.listening() if verb not in KEEP_NOTHING else nullcontext():
            result = run_verb(verb, _common(values), given, quiet=as_json, stop=stop, team=team)
    except CompressError as error:
        if debug:
            raise
        complain(error.cause, error.remedy)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt as interrupt:
        if debug:
            raise
        complain("Interrupted.", _what_is_kept(verb, values))
        number = interrupt.number if isinstance(interrupt, Stopped) else signal.SIGINT
        raise typer.Exit(128 + number) from None
    except Exception as error:
        if debug:
            raise
        complain(
            f"Unexpected {type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}.",
            "Run it again with --debug and report what that shows.",
        )
        raise typer.Exit(1) from None
    if as_json:
        sys.stdout.write(json.dumps(result, indent=2, sort_keys=True, default=str) + "\n")
    if not result.get("ok", True):
        raise typer.Exit(1)


def _notice(text: str) -> None:
    """Write a line from a signal handler, which may have interrupted a write to ``sys.stderr``."""
    os.write(2, f"{text}\n".encode())


def _what_is_kept(verb: str, values: Mapping[str, Any]) -> str:
    if verb in KEEP_NOTHING:
        return "Nothing was left behind."
    if values.get("models") and not values.get("out"):
        return "Nothing is kept: with --out it would be."
    return "Finished work is kept: the same command goes on from here."


def meanings() -> dict[str, dict[str, dict[str, str]]]:
    """What ``--help`` says of every option, by verb and by the option's name in a recipe."""
    group: Any = typer.main.get_command(app)
    return {
        "meanings": {
            verb: {parameter.name: parameter.help or "" for parameter in command.params}
            for verb, command in group.commands.items()
        }
    }


def complain(cause: str, remedy: str) -> None:
    """The two sentences of a failure, on standard error."""
    sys.stderr.write(f"error: {cause}\n{remedy}\n")
