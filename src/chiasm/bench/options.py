"""The flags of `chiasm bench serve`. Values are kept as typed; properties give them meaning."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, AliasChoices, Field, SecretStr, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from chiasm.bench import lengths
from chiasm.bench.records import MAX_REQUESTS
from chiasm.bench.stats import Slo
from chiasm.bench.sweep import MAX_CONCURRENCY, Point
from chiasm.bench.sweep import parse as parse_points
from chiasm.bench.trace import MAX_IMAGE_SIDE, MAX_IMAGES
from chiasm.bench.workload import RandomWorkload, Size
from chiasm.transport import tls as credentials
from chiasm.types import TlsFiles

DEFAULT_NUM_REQUESTS = 100


def parse_sizes(text: str) -> tuple[Size, ...]:
    """Reads `448x448,896x672`: widths and heights. Raises ValueError."""
    sizes = []
    for item in text.split(","):
        width, _, height = item.partition("x")
        if not width.isdecimal() or not height.isdecimal():
            raise ValueError(f"{item!r} is not of the form 448x448")
        size = Size(int(width), int(height))
        if not all(1 <= side <= MAX_IMAGE_SIDE for side in size):
            raise ValueError(f"{item!r}: sides must lie in 1..{MAX_IMAGE_SIDE}")
        sizes.append(size)
    return tuple(sizes)


def _word(parse: Callable[[str], object]) -> AfterValidator:
    def check(text: str) -> str:
        if text:
            parse(text)
        return text

    return AfterValidator(check)


Length = Annotated[str, _word(lengths.parse)]


class WorkloadOptions(BaseSettings):
    """What is sent."""

    dataset: Literal["random", "trace"] = Field("random", description="Source of the requests.")
    trace: Path | None = Field(None, description="Recorded workload, JSON lines.")
    input_len: Length = Field(
        "128", description="Text tokens: 128, uniform:LOW,HIGH or lognormal:MEDIAN,SIGMA,MAX."
    )
    output_len: Length = Field("64", description="Tokens to generate, written as --input-len.")
    image_share: float = Field(0.0, ge=0, le=1, description="Share of requests with images.")
    images_per_request: int = Field(1, ge=1, le=MAX_IMAGES, description="Images of such a request.")
    image_size: Annotated[str, _word(parse_sizes)] = Field(
        "448x448", description="Pixels, WIDTHxHEIGHT; several with commas are drawn from."
    )
    image_pool: int = Field(0, ge=0, description="Number of different images; 0: each is new.")
    prefix_groups: int = Field(0, ge=0, description="Groups of requests that share a prefix.")
    prefix_tokens: int = Field(
        0, ge=0, le=lengths.MAX_TOKENS, description="Tokens of a prefix, before --input-len."
    )
    turns: int = Field(1, ge=1, le=256, description="Turns of a conversation.")
    think_time: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="Seconds from an answer to the next turn."
    )
    prompt: Literal["tokens", "chat"] = Field(
        "tokens", description="How a chiasm gateway is asked; over HTTP prompts are always text."
    )
    temperature: float = Field(0.0, ge=0, le=100, description="0 is greedy.")
    ignore_eos: bool = Field(True, description="Generate exactly as many tokens as asked for.")
    seed: int = Field(0, ge=0, description="Seed of everything random.")

    @property
    def random_workload(self) -> RandomWorkload:
        """The workload of --dataset random."""
        return RandomWorkload(
            input_len=lengths.parse(self.input_len),
            output_len=lengths.parse(self.output_len),
            image_share=self.image_share,
            images_per_request=self.images_per_request,
            image_sizes=parse_sizes(self.image_size),
            image_pool=self.image_pool,
            prefix_groups=self.prefix_groups,
            prefix_tokens=self.prefix_tokens,
            turns=self.turns,
        )


class _TlsEnvironment(EnvSettingsSource):
    """CHIASM_TLS_CA and its kin, as all commands read them; of their other variables none."""

    def __call__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__call__().items() if "tls_" in name}


class _Environment(EnvSettingsSource):
    """CHIASM_BENCH_<OPTION>; for --json too, whose field has another name and so no prefix."""

    def __call__(self) -> dict[str, Any]:
        values = super().__call__()
        values.pop("json", None)
        if file := os.environ.get("CHIASM_BENCH_JSON"):
            values["json"] = file
        return values


class BenchOptions(WorkloadOptions):
    """Measures a running system under load, in a closed loop or an open one.

    Exit status: 0, or 2 for options that cannot be, or 1 when the system cannot be reached or
    answers nothing, or 130 after Ctrl-C, which prints the results so far.
    """

    model_config = SettingsConfigDict(env_prefix="CHIASM_BENCH_", extra="ignore", frozen=True)

    endpoint: str = Field(
        "127.0.0.1:8000", description="host:port of a gateway, or an OpenAI URL up to /completions."
    )
    compare: list[str] = Field(
        [], description="NAME=ENDPOINT, twice or more: measured in turns, instead of --endpoint."
    )
    model: str = Field("", description="Model to ask an OpenAI server for; empty: its first.")
    api_key: SecretStr = Field(
        SecretStr(""),
        description="Bearer token for the servers; for gateways also CHIASM_API_KEY. Better set a "
        "variable: others can see flags.",
    )
    tls: bool = Field(False, description="Encrypt calls of gateways; --tls-ca does so by itself.")
    tls_ca: Path | None = Field(
        None, description="PEM certificate of the gateways' CA; unset: well-known ones."
    )
    tls_cert: Path | None = Field(None, description="PEM certificate to show.")
    tls_key: Path | None = Field(None, description="PEM key of --tls-cert.")
    tls_name: str = Field(
        "", description="Name in the gateways' certificate; unset: the host that is called."
    )

    concurrency: int | None = Field(
        None, ge=1, le=MAX_CONCURRENCY, description="Closed loop: requests in flight. Default 1."
    )
    rate: float | None = Field(
        None, gt=0, description="Open loop: requests per second; inf sends all at once."
    )
    arrivals: Literal["poisson", "constant"] = Field("poisson", description="Gaps of --rate.")
    burstiness: float = Field(
        1.0, gt=0, le=1e6, description="Gamma shape of the gaps; 1: Poisson, less: burstier."
    )
    num_requests: int | None = Field(
        None, ge=1, le=MAX_REQUESTS, description="Requests of a run. Default 100 or the duration."
    )
    duration: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Seconds in which requests are sent."
    )
    warmup: int = Field(4, ge=0, le=10_000, description="Requests before, which do not count.")
    timeout: float = Field(600.0, gt=0, le=86_400, description="Seconds each request may take.")
    max_in_flight: int = Field(
        1024, ge=1, le=65_536, description="Open loop: more conversations at once fail, unsent."
    )
    slo: Annotated[str, _word(Slo.parse)] = Field(
        "", description="Limits for goodput in ms: ttft=500,itl=50,tpot=40,e2e=9000."
    )
    sweep: Annotated[str, _word(parse_points)] = Field(
        "", description="Several loads in one go: rate=0.5,1,2 or concurrency=1,4,16."
    )
    repeat: int = Field(1, ge=1, le=100, description="Times to measure everything.")

    json_file: Path | None = Field(
        None, validation_alias=AliasChoices("json"), description="File for the whole result."
    )
    records: Path | None = Field(None, description="File for every request, JSON lines.")
    plot: Path | None = Field(None, description="File for a figure: .svg or .png.")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.dataset == "trace" and self.trace is None:
            raise ValueError("--dataset trace needs --trace FILE")
        is_random = self.dataset == "random" and "dataset" in self.model_fields_set
        if is_random and self.trace is not None:
            raise ValueError("--trace is not for --dataset random")
        if bool(self.prefix_groups) != bool(self.prefix_tokens):
            raise ValueError("--prefix-groups and --prefix-tokens go together")
        if sum((self.concurrency is not None, self.rate is not None, bool(self.sweep))) > 1:
            raise ValueError("give one of --concurrency, --rate and --sweep")
        if self.arrivals == "constant" and self.burstiness != 1:
            raise ValueError("--burstiness shapes random gaps; --arrivals constant has none")
        if self.plot is not None and self.plot.suffix not in (".svg", ".png"):
            raise ValueError(f"--plot: {str(self.plot)!r} ends neither in .svg nor in .png")
        names = [name for name, _ in self.endpoints]
        if self.compare and (len(names) < 2 or len(set(names)) < len(names)):
            raise ValueError("--compare is given at least twice, with different names")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        tls = _TlsEnvironment(settings_cls, env_prefix="CHIASM_")
        return init_settings, _Environment(settings_cls), tls

    @property
    def gateway_key(self) -> str:
        """The API key for gateways. What only they should know is not sent to other servers."""
        return self.api_key.get_secret_value() or os.environ.get("CHIASM_API_KEY", "")

    @property
    def gateway_tls(self) -> TlsFiles | None:
        """With what gateways are called; None: plain text. Raises InvalidArgument."""
        return credentials.of_client(
            encrypts=self.tls,
            ca=self.tls_ca,
            cert=self.tls_cert,
            key=self.tls_key,
            name=self.tls_name,
        )

    @property
    def endpoints(self) -> list[tuple[str, str]]:
        """Names and addresses of what is measured. Raises ValueError."""
        if not self.compare:
            return [("", self.endpoint)]
        pairs = []
        for text in self.compare:
            name, _, endpoint = text.partition("=")
            if not name or not endpoint:
                raise ValueError(f"--compare: {text!r} is not of the form NAME=ENDPOINT")
            pairs.append((name, endpoint))
        return pairs

    @property
    def points(self) -> tuple[Point, ...]:
        """The loads to measure at. Without any given: a trace's own times, or one at a time."""
        if self.sweep:
            return parse_points(self.sweep)
        if self.rate is not None:
            return (Point("rate", self.rate),)
        if self.concurrency is None and self.trace is not None:
            return (Point("recorded", 0.0),)
        return (Point("concurrency", self.concurrency or 1),)

    @property
    def most_requests(self) -> int:
        """Bound of a run's requests; a duration or a trace may end it sooner."""
        if self.num_requests is not None:
            return self.num_requests
        is_bounded = self.duration is not None or self.trace is not None
        return MAX_REQUESTS if is_bounded else DEFAULT_NUM_REQUESTS

    @property
    def limits(self) -> Slo | None:
        """The SLO, if there is one."""
        return Slo.parse(self.slo) if self.slo else None
