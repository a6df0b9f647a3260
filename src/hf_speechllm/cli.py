"""Command line: `hf-speechllm transcribe | stream | synthesize | info`.

torch and transformers are imported inside the commands, so that `--help` answers at once. Text goes to standard
output, everything else to standard error. Exit codes: 0 all done, 1 some of several files could not be transcribed,
2 wrong usage or input, and nothing was written.
"""

import json
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import __version__
from .shipped import SHIPPED_MODEL, SHIPPED_SYNTHESISER, shipped_folder
from .subtitles import to_srt, to_vtt


if TYPE_CHECKING:
    from collections.abc import Container, Iterator

    import numpy as np

app = typer.Typer(
    name="hf-speechllm",
    help="Speech recognition and synthesis with models in HuggingFace form.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)

STREAM_BLOCK_SECONDS = 0.16
RECOGNISERS = ("wenet_u2pp", "funasr_paraformer", "funasr_sensevoice")


class Format(str, Enum):
    text = "text"
    json = "json"
    srt = "srt"
    vtt = "vtt"


class Decoding(str, Enum):
    ctc_greedy = "ctc_greedy"
    ctc_prefix_beam_search = "ctc_prefix_beam_search"
    attention = "attention"
    attention_rescoring = "attention_rescoring"


ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder or Hub id. Default: the shipped English digits model.")
]
HotwordsOption = Annotated[
    Path | None, typer.Option(help="Text file, one phrase to prefer a line.", exists=True, dir_okay=False)
]
DecodingOption = Annotated[
    Decoding | None, typer.Option(help="Default: attention rescoring where the model has a decoder.")
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code of a model that this package does not know.")
]


BFloat16Option = Annotated[
    bool,
    typer.Option(
        "--bfloat16", help="Round matrix products to bfloat16: faster on CPUs with AMX or AVX512-BF16, not exact."
    ),
]


def _fail(message: object) -> typer.Exit:
    """One line on standard error, and the exit to raise."""
    typer.echo(f"error: {' '.join(str(message).split())}", err=True)
    return typer.Exit(2)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Speech recognition and synthesis with models in HuggingFace form."""


def _resolve_model(model: str | None, shipped: str, description: str) -> str:
    """The model that was asked for, or the shipped one, which then says what it is on standard error."""
    if model is not None:
        return model
    try:
        path = shipped_folder("pretrained", shipped)
    except FileNotFoundError as error:
        raise _fail(f"no --model given, and {error}") from error
    typer.echo(f"no --model given: using the shipped {shipped}, {description}", err=True)
    return str(path)


def _resolve_recogniser(model: str | None) -> str:
    return _resolve_model(model, SHIPPED_MODEL, "a tiny English model that knows only the digits 0 to 9")


def _from_pretrained(model: str, trust_remote_code: bool, model_types: "Container[str] | None", *classes: Any) -> list:
    """What each class makes of a folder or Hub id; loading trouble ends the program with one line.

    Args:
        model_types: the families that can do what is asked for; `None` for whatever `classes` know.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    from . import auto  # noqa: F401

    logging.disable_progress_bar()
    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise _fail(f"{model}: not a model folder: expected config.json in it")
    if not folder.is_dir() and (folder.exists() or folder.is_absolute() or model.startswith(".")):
        raise _fail(f"{model}: expected the folder of a model, or a Hub id; {_what_is_at(folder)}")
    options = {"trust_remote_code": trust_remote_code}
    try:
        model_type = AutoConfig.from_pretrained(model, **options).model_type
        if model_types is not None and model_type not in model_types:
            expected = " or ".join(sorted(model_types))
            raise _fail(f"{model}: config.json: model_type: expected {expected}, got {model_type}")
        return [kind.from_pretrained(model, **options) for kind in classes]
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _fail(f"{model}: cannot be loaded: {error}") from error


def _what_is_at(path: Path) -> str:
    return "it is a file" if path.is_file() else "there is no such folder"


def _check_bfloat16(wanted: bool, device: str = "cpu") -> None:
    from .cpu_inference import bfloat16_obstacle

    if wanted and (obstacle := bfloat16_obstacle(device)) is not None:
        raise _fail(f"--bfloat16: {obstacle}")


def _load(model: str, trust_remote_code: bool, bfloat16: bool = False) -> tuple[Any, Any]:
    """A recogniser in evaluation mode, and its processor."""
    from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

    from .cpu_inference import pack_linear_weights, use_bfloat16_products

    # The code of a stranger's model says itself what it can do.
    families = None if trust_remote_code else RECOGNISERS
    processor, network = _from_pretrained(model, trust_remote_code, families, AutoProcessor, AutoModelForSpeechSeq2Seq)
    if bfloat16:
        use_bfloat16_products(network.eval())
    else:
        pack_linear_weights(network.eval())
    return network, processor


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise _fail(f"--device: expected one that torch has here, such as cpu, got {device!r}: {reason}") from error


def _check_output(output: Path | None) -> None:
    if output is not None and not output.parent.is_dir():
        raise _fail(f"--output: {output}: expected an existing folder, got {output.parent}")


def _read_hotwords(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    try:
        phrases = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise _fail(f"--hotwords: {path}: expected UTF-8 text, got byte {error.object[error.start]:#x}") from error
    return [phrase for phrase in phrases if phrase] or None


@app.command()
def transcribe(
    files: Annotated[list[Path], typer.Argument(help="Audio files: wav, flac, mp3, ogg, ...", metavar="FILES...")],
    model: ModelOption = None,
    format: Annotated[Format, typer.Option("--format", "-f", help="What to write.")] = Format.text,
    timestamps: Annotated[bool, typer.Option("--timestamps", help="Add word times (text and json).")] = False,
    hotwords: HotwordsOption = None,
    decoding: DecodingOption = None,
    num_beams: Annotated[int | None, typer.Option(min=1, help="Hypotheses kept by the searches.")] = None,
    chunk_length: Annotated[
        float | None, typer.Option(min=0.5, help="Cut long audio into overlapping windows of this many seconds.")
    ] = None,
    vad: Annotated[
        str | None, typer.Option(help="Folder or Hub id of a detector of speech: cut audio at its pauses.")
    ] = None,
    punctuation: Annotated[str | None, typer.Option(help="Folder or Hub id of a punctuation model.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Files (or windows, or pieces) per forward pass.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...")] = "cpu",
    bfloat16: BFloat16Option = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write here instead of standard output.", dir_okay=False)
    ] = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Transcribe audio files.

    A file that cannot be read is named on standard error, the others are still transcribed, and the exit code is 1;
    2 if no file could be read.
    """
    if format in (Format.srt, Format.vtt) and len(files) > 1:
        raise _fail(f"--format {format.value} takes one file, got {len(files)}")
    if vad is not None and chunk_length is not None:
        raise _fail("--chunk-length: with --vad the pauses decide where audio is cut; give one of the two")
    _check_output(output)
    _check_device(device)
    _check_bfloat16(bfloat16, device)
    network, processor = _load(_resolve_recogniser(model), trust_remote_code, bfloat16)

    from transformers import AutoModel, AutoTokenizer

    from .models.pipeline_speech_recognition import SpeechRecognitionPipeline

    options: dict[str, Any] = {"batch_size": batch_size, "hotwords": _read_hotwords(hotwords)}
    if timestamps or format is not Format.text:
        options["return_timestamps"] = "word"
    if format is Format.json:
        options["return_confidence"] = True
    if decoding is not None:
        options["decoding"] = decoding.value
    if num_beams is not None:
        options["num_beams"] = num_beams
    if chunk_length is not None:
        options["chunk_length_s"] = chunk_length
    if vad is not None:
        options["vad"] = _from_pretrained(vad, trust_remote_code, ["funasr_fsmn_vad"], AutoModel)[0].eval()
    if punctuation is not None:
        families = ["funasr_ct_transformer"]
        helper, words = _from_pretrained(punctuation, trust_remote_code, families, AutoModel, AutoTokenizer)
        options["punctuation"] = (helper.eval(), words)
    recognise = SpeechRecognitionPipeline(
        model=network,
        processor=processor,
        feature_extractor=processor.feature_extractor,
        tokenizer=processor.tokenizer,
        device=device,
    )

    audio, readable, failures = [], [], 0
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        reading = progress.add_task("reading", total=len(files))
        for file in files:
            try:
                audio.append(_load_audio(file, processor.feature_extractor.sampling_rate))
                readable.append(file)
            except ValueError as error:
                failures += 1
                typer.echo(f"error: {error}", err=True)
            progress.advance(reading)
        recognising = progress.add_task("recognising", total=len(audio))
        results = []
        try:
            for result in recognise(iter_inputs(audio), **options):
                results.append(result)
                progress.advance(recognising)
        except ValueError as error:
            raise _fail(error) from error

    text = _render(format, timestamps, len(files) > 1, readable, results)
    if output is None:
        typer.echo(text, nl=False)
    elif results or not failures:
        partial = output.with_name(output.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(output)
    if failures:
        raise typer.Exit(1 if results else 2)


def iter_inputs(audio: "list[np.ndarray]"):
    """A generator, for which a pipeline answers one by one."""
    yield from audio


def _load_audio(file: Path, sampling_rate: int) -> "np.ndarray":
    from .audio import load_audio

    return load_audio(file, sampling_rate)


def _render(
    format: Format, timestamps: bool, with_names: bool, files: list[Path], results: list[dict[str, Any]]
) -> str:
    if format is Format.srt:
        return "".join(to_srt(result["chunks"]) for result in results)
    if format is Format.vtt:
        return "".join(to_vtt(result["chunks"]) for result in results)
    lines = []
    for file, result in zip(files, results, strict=True):
        if format is Format.json:
            if not timestamps:
                result = {key: value for key, value in result.items() if key != "chunks"}
            lines.append(json.dumps({"file": str(file), **result}, ensure_ascii=False))
            continue
        lines.append(f"{file}\t{result['text']}" if with_names else result["text"])
        for chunk in result.get("chunks", []):
            lines.append(f"{chunk['timestamp'][0]:8.2f} {chunk['timestamp'][1]:8.2f}  {chunk['text'].strip()}")
    return "".join(f"{line}\n" for line in lines)


@app.command()
def stream(
    file: Annotated[str, typer.Argument(help="A 16-bit PCM wav file, or - for raw 16-bit mono from standard input.")],
    model: ModelOption = None,
    chunk_size: Annotated[int, typer.Option(min=1, help="Encoder frames per step.")] = 16,
    num_left_chunks: Annotated[int, typer.Option(min=-1, help="Chunks of left context, -1 for all.")] = -1,
    sampling_rate: Annotated[int, typer.Option(min=1000, help="Rate of raw input in Hz.")] = 16000,
    hotwords: HotwordsOption = None,
    decoding: DecodingOption = None,
    bfloat16: BFloat16Option = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Transcribe while audio arrives: a line per changed partial result, then the final one."""
    _check_bfloat16(bfloat16)
    if file == "-":
        blocks, rate = _raw_blocks(sys.stdin.buffer, sampling_rate), sampling_rate
    else:
        blocks, rate = _wav_blocks(Path(file))
    network, processor = _load(_resolve_recogniser(model), trust_remote_code, bfloat16)

    import numpy as np
    import torch

    from .audio import resample

    target = processor.feature_extractor.sampling_rate
    if rate != target and file == "-":
        raise _fail(f"--sampling-rate: this model expects raw input at {target} Hz, got {rate} Hz")
    if rate != target:
        samples = np.concatenate([*blocks, np.zeros(0, dtype=np.float32)])
        samples = resample(torch.from_numpy(samples), rate, target).numpy()
        size = int(STREAM_BLOCK_SECONDS * target)
        blocks = (samples[start : start + size] for start in range(0, len(samples), size))

    options: dict[str, Any] = {"chunk_size": chunk_size, "num_left_chunks": num_left_chunks}
    if decoding is not None:
        options["decoding"] = decoding.value
    try:
        if phrases := _read_hotwords(hotwords):
            options["hotwords"] = processor.hotword_ids(phrases)
        for text, is_final in stream_text(network, processor, blocks, **options):
            typer.echo(f"{'final' if is_final else 'partial'}\t{text}")
            sys.stdout.flush()
    except ValueError as error:
        raise _fail(error) from error


def stream_text(network: Any, processor: Any, blocks: Any, chunk_size: int = 16, **options: Any):
    """Feeds blocks of samples to a streaming model.

    Args:
        network: model with `stream_step`.
        processor: its processor, with `stream`.
        blocks: iterable of float32 sample arrays at the model's rate, of any lengths.
        chunk_size: encoder frames per step.
        options: of `open_stream`.

    Yields:
        `(text, is_final)` whenever the partial result changes, and once at the end.
    """
    import numpy as np

    rate = processor.feature_extractor.sampling_rate
    front_end, state = None, network.open_stream(1, chunk_size=chunk_size, **options)
    text = ""

    def pieces():
        for block in blocks:
            yield block, False
        yield np.zeros(0, dtype=np.float32), True

    for samples, is_last in pieces():
        windows, front_end = processor.stream(
            samples, state=front_end, sampling_rate=rate, is_last=is_last, chunk_size=chunk_size
        )
        for number, window in enumerate(windows):
            ends = is_last and number == len(windows) - 1
            output = network.stream_step(**window, state=state, is_last=ends)
            state = output.state
            before, text = text, processor.batch_decode(output.sequences, skip_special_tokens=True)[0]
            if ends or text != before:
                yield text, ends


def _wav_blocks(path: Path):
    """Blocks of mono float32 samples of a file, and its rate."""
    import soundfile

    if not path.is_file():
        raise _fail(f"{path}: no such file")
    try:
        info = soundfile.info(str(path))
    except soundfile.SoundFileError as error:
        raise _fail(f"{path}: cannot be read as audio: {error}") from error
    if info.subtype != "PCM_16":
        raise _fail(f"{path}: expected 16-bit PCM, got {info.subtype}; `transcribe` reads other files")

    def blocks():
        size = int(STREAM_BLOCK_SECONDS * info.samplerate)
        for block in soundfile.blocks(str(path), blocksize=size, dtype="float32", always_2d=True):
            yield block.mean(axis=1)

    return blocks(), info.samplerate


def _raw_blocks(source: BinaryIO, sampling_rate: int):
    """Blocks of float32 samples of raw little-endian 16-bit mono input, as they arrive."""
    import numpy as np

    size = 2 * int(STREAM_BLOCK_SECONDS * sampling_rate)
    rest = b""
    while data := source.read(size):
        data = rest + data
        whole = len(data) // 2 * 2
        rest = data[whole:]
        yield np.frombuffer(data[:whole], dtype="<i2").astype(np.float32) / 32768.0


@app.command()
def synthesize(
    text: Annotated[str | None, typer.Argument(help="What to say; - reads standard input.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The wav file to write.", dir_okay=False)] = Path(
        "speech.wav"
    ),
    model: Annotated[str | None, typer.Option("--model", "-m", help="Folder or Hub id of a synthesiser.")] = None,
    speaker: Annotated[str | None, typer.Option(help="A voice that the model knows.")] = None,
    prompt_audio: Annotated[Path | None, typer.Option(help="A recording of the voice.")] = None,
    prompt_text: Annotated[str | None, typer.Option(help="What the recording says.")] = None,
    instruct: Annotated[str | None, typer.Option(help="How to speak.")] = None,
    source_audio: Annotated[
        Path | None, typer.Option(help="Speech to say in the other voice, in place of TEXT.")
    ] = None,
    mode: Annotated[str | None, typer.Option(help="Default: what the other options make of it.")] = None,
    speed: Annotated[float, typer.Option(min=0.1, max=10.0, help="2 is twice as fast.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same audio.")] = None,
    normalize: Annotated[bool, typer.Option(help="Write numbers out, and split into sentences.")] = True,
    stream: Annotated[
        bool, typer.Option("--stream", help="Write while it is spoken; - as output: raw 16-bit.")
    ] = False,
    speakers: Annotated[bool, typer.Option("--speakers", help="List the voices that the model knows.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...")] = "cpu",
    bfloat16: BFloat16Option = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Say a text, in a voice that the model knows or in that of a recording."""
    if not speakers:
        if (text is None) == (source_audio is None):
            raise _fail(f"expected TEXT, or --source-audio, got {'neither' if text is None else 'both'}")
        if stream and speed != 1.0:
            raise _fail("--speed: a stream cannot change it")
        _check_output(output)
    _check_device(device)
    _check_bfloat16(bfloat16, device)
    speak = _load_synthesiser(model, device, trust_remote_code, bfloat16)
    if speakers:
        for name in speak.processor.speakers:
            typer.echo(name)
        return
    text = sys.stdin.read() if text == "-" else text
    if text is not None and not speak.processor.split_text(text, normalize):
        raise _fail(f"TEXT: expected words, got {text!r}")
    known = list(speak.processor.speakers)
    takes_first_voice = speaker is None and prompt_audio is None and bool(known)
    if takes_first_voice:
        speaker = known[0]
    voice = {
        **{"mode": mode, "speaker": speaker, "prompt_audio": prompt_audio, "prompt_text": prompt_text},
        **{"instruct": instruct, "source_audio": source_audio},
    }
    voice = {name: value for name, value in voice.items() if value is not None}
    item = {} if text is None else {"text": text}
    options = {"seed": seed, "normalize": normalize}
    rate = speak.model.config.sampling_rate
    try:
        if stream:
            seconds = _write_stream(speak.stream({**item, **voice}, **options), output, rate)
        else:
            audio = speak({**item, **voice}, speed=speed, **options)["audio"]
            seconds = _write_stream(iter([audio]), output, rate)
    except (ValueError, KeyError) as error:
        raise _fail(error.args[0] if error.args else error) from error
    if takes_first_voice:
        typer.echo(f"no --speaker and no --prompt-audio given: using the voice {speaker!r}", err=True)
    typer.echo(f"{seconds:.2f} s of audio: {output}", err=True)


def _load_synthesiser(model: str | None, device: str, trust_remote_code: bool, bfloat16: bool) -> Any:
    """The pipeline of a synthesiser."""
    model = _resolve_model(model, SHIPPED_SYNTHESISER, "a tiny English voice that knows only digits")

    from transformers import AutoModelForTextToWaveform, AutoProcessor

    from .cpu_inference import use_bfloat16_products
    from .models.pipeline_cosyvoice import CosyVoiceTextToSpeechPipeline

    processor, network = _from_pretrained(
        model, trust_remote_code, ["cosyvoice"], AutoProcessor, AutoModelForTextToWaveform
    )
    if bfloat16:
        use_bfloat16_products(network)
    return CosyVoiceTextToSpeechPipeline(network.eval(), processor, device=device)


def _write_stream(pieces: "Iterator[np.ndarray]", output: Path, sampling_rate: int) -> float:
    """Writes pieces of audio as they come, and returns how many seconds they were. `-` is raw 16-bit on standard
    output; a wav file appears when it is complete."""
    import numpy as np
    import soundfile

    samples = 0
    if str(output) == "-":
        for piece in pieces:
            sys.stdout.buffer.write((np.clip(piece, -1, 1) * 32767).astype("<i2").tobytes())
            sys.stdout.buffer.flush()
            samples += len(piece)
        return samples / sampling_rate
    partial = output.with_name(output.name + ".partial")
    try:
        with soundfile.SoundFile(partial, "w", sampling_rate, 1, subtype="PCM_16", format="WAV") as file:
            for piece in pieces:
                file.write(np.clip(piece, -1, 1))
                samples += len(piece)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    return samples / sampling_rate


@app.command()
def info(
    model: Annotated[str | None, typer.Argument(help="Folder or Hub id. Default: the shipped model.")] = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Tell what a model is: family, size, vocabulary, sampling rate, streaming."""
    network, processor = _load(_resolve_recogniser(model), trust_remote_code)
    config = network.config
    parameters = sum(parameter.numel() for parameter in network.parameters())
    facts = {
        "model_type": config.model_type,
        "class": type(network).__name__,
        "parameters": parameters,
        "dtype": str(network.dtype).removeprefix("torch."),
        "vocabulary": config.vocab_size,
        "sampling_rate": processor.feature_extractor.sampling_rate,
        "seconds_per_frame": config.inputs_to_logits_ratio / processor.feature_extractor.sampling_rate,
        "encoder": f"{config.num_hidden_layers} x {config.hidden_size}",
    }
    if config.model_type == "wenet_u2pp":
        facts["encoder"] += f" {config.encoder_type}, {config.mlp_type}"
        facts["decoder_layers"] = config.decoder_layers + config.right_decoder_layers
        facts["streaming"] = config.is_streamable
    elif config.model_type == "funasr_sensevoice":
        facts["languages"] = ", ".join(config.language_prompt_ids)
        facts["emotions"] = ", ".join(config.emotion_token_ids)
        facts["events"] = ", ".join(config.event_token_ids)
    width = max(map(len, facts))
    for name, value in facts.items():
        typer.echo(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    app()
