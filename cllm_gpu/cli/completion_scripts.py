"""Completion scripts for bash, zsh and fish. They contain all words and start no process when Tab is pressed.

Each function takes the commands with their descriptions, and the flags of every command.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence

from cllm_gpu.cli.completion_flags import Flag

Flags = Mapping[str, Sequence[Flag]]
Script = Callable[[Mapping[str, str], Flags], str]


def _words(flags: Sequence[Flag]) -> tuple[str, ...]:
    """The possible values of a command's positional argument; empty if it is a file."""
    return tuple(choice for flag in flags if not flag.names for choice in flag.choices)


# ---- bash

_BASH = """\
# cllm-gpu: completion for bash
_cllm_gpu() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" flag="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
    if [[ $word == "=" ]]; then  # --flag=VALUE is three words to bash
        word=""
    elif [[ $flag == "=" ]]; then
        flag="${{COMP_WORDS[COMP_CWORD-2]}}"
    fi
    if (( COMP_CWORD == 1 )); then
        words={commands}
    else
        case "${{COMP_WORDS[1]}} $flag" in
{values}
            *)
                case "${{COMP_WORDS[1]}} $word" in
{flags}
                esac ;;
        esac
    fi
    COMPREPLY=( $(compgen -W "$words" -- "$word") )
}}
complete -o bashdefault -o default -F _cllm_gpu cllm-gpu
"""


def bash(commands: Mapping[str, str], flags: Flags) -> str:
    """The script for bash. If no word matches, bash completes file names."""
    values, names = [], []
    for command in commands:
        chosen = [(name, flag.choices) for flag in flags[command] for name in flag.names if flag.choices]
        values += [f"            '{command} {name}') words={_bash_words(choices)} ;;" for name, choices in chosen]
        every = [name for flag in flags[command] for name in flag.names]
        names.append(f"                    '{command} -'*) words={_bash_words(every)} ;;")
        if words := _words(flags[command]):
            names.append(f"                    '{command} '*) words={_bash_words(words)} ;;")
    first = _bash_words([*commands, "--help", "--version"])
    return _BASH.format(commands=first, values="\n".join(values), flags="\n".join(names))


def _bash_words(words: Iterable[str]) -> str:
    return shlex.quote(" ".join(words))


# ---- zsh

_ZSH = """\
#compdef cllm-gpu
# cllm-gpu: completion for zsh
_cllm_gpu() {{
    local -a commands
    if (( CURRENT == 2 )); then
        commands=(
{commands}
        )
        _describe command commands
        return
    fi
    local command=$words[2]
    shift words
    (( CURRENT-- ))
    case $command in
{cases}
    esac
}}
if [[ $funcstack[1] == _cllm_gpu ]]; then  # loaded from fpath
    _cllm_gpu "$@"
else
    compdef _cllm_gpu cllm-gpu
fi
"""


def zsh(commands: Mapping[str, str], flags: Flags) -> str:
    """The script for zsh, which shows a description next to each word."""
    cases = []
    for command in commands:
        words = _words(flags[command])
        rest = f"*:word:({' '.join(words)})" if words else "*:file:_files"
        specs = [_zsh_flag(name, flag) for flag in flags[command] for name in flag.names]
        lines = " \\\n".join(f"                {shlex.quote(spec)}" for spec in [*specs, rest])
        cases.append(f"        {command})\n            _arguments \\\n{lines} ;;")
    described = (shlex.quote(f"{name}:{_zsh_text(text)}") for name, text in commands.items())
    return _ZSH.format(commands="\n".join(f"            {line}" for line in described), cases="\n".join(cases))


def _zsh_flag(name: str, flag: Flag) -> str:
    spec = f"{name}[{_zsh_text(flag.description)}]"
    if not flag.takes_value:
        return spec
    if flag.choices:
        return f"{spec}:value:({' '.join(flag.choices)})"
    return f"{spec}:value:{'_files' if flag.takes_file else ' '}"


def _zsh_text(text: str) -> str:
    for special in "\\:[]":
        text = text.replace(special, f"\\{special}")
    return text


# ---- fish


def fish(commands: Mapping[str, str], flags: Flags) -> str:
    """The script for fish, which shows a description next to each word."""
    lines = ["# cllm-gpu: completion for fish"]
    for command, text in commands.items():
        lines.append(f"complete -c cllm-gpu -n __fish_use_subcommand -f -a {command} -d {_fish_text(text)}")
    for command in commands:
        here = f"complete -c cllm-gpu -n '__fish_seen_subcommand_from {command}'"
        if words := _words(flags[command]):
            lines.append(f"{here} -f -a {_fish_text(' '.join(words))}")
        named = (flag for flag in flags[command] if flag.names)
        lines += [f"{here} {_fish_flag(flag)} -d {_fish_text(flag.description)}" for flag in named]
    return "\n".join(lines) + "\n"


def _fish_flag(flag: Flag) -> str:
    names = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in flag.names)
    if flag.choices:
        return f"{names} -x -a {_fish_text(' '.join(flag.choices))}"
    return f"{names} {'-r' if flag.takes_file else '-x'}" if flag.takes_value else names


def _fish_text(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


SCRIPTS: Mapping[str, Script] = {"bash": bash, "zsh": zsh, "fish": fish}
