"""The gateway's side of the vision encoders: placement, upload, errors, absence."""

from __future__ import annotations

import asyncio
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gateway.harness import FakeEncoder, Stack, png, running
from waiting import WAIT_S, until

from chiasm import errors
from chiasm.client import AsyncClient, Tokens, assistant, image, user
from chiasm.membership import MemberInfo, Role
from chiasm.services.gateway import prompts
from chiasm.services.gateway.domain import MediaItem, MediaSource
from chiasm.services.gateway.encoders import MAX_BREAKS, rank
from chiasm.services.gateway.media import data_uri, digest, take_in
from chiasm.types import MediaKind

pytestmark = pytest.mark.usefixtures("decoder")

OFTEN = 10
"""A refusal that meets a write still under way is lost inside grpc, and the encoder asked again: it
must refuse again then."""


@pytest.fixture
async def patient(tiny_checkpoint: Path) -> AsyncIterator[Stack]:
    """A stack whose requests wait for an encoder for as long as a test does, and no encoder."""
    async with running(tiny_checkpoint, park_timeout_s=WAIT_S) as started:
        await started.add_decoder()
        yield started


@pytest.fixture
async def patient_client(patient: Stack) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(patient.address, timeout_s=2 * WAIT_S) as opened:
        yield opened


def members(*addresses: str) -> list[MemberInfo]:
    return [MemberInfo(member_id=a, role=Role.VISION_ENCODER, address=a) for a in addresses]


@pytest.mark.parametrize("gone", ["a:1", "b:1", "c:1"])
def test_only_the_share_of_an_encoder_that_goes_is_moved(gone: str) -> None:
    every = members("a:1", "b:1", "c:1")
    left = [member for member in every if member.address != gone]
    homes = [rank(f"digest {i}", every)[0].address for i in range(300)]
    assert all(60 < homes.count(m.address) < 140 for m in every)
    for i, home in enumerate(homes):
        if home != gone:
            assert rank(f"digest {i}", left)[0].address == home


@pytest.mark.parametrize("field", ["image", "header.size_bytes"])
async def test_error_is_told_in_terms_of_a_chat(
    field: str, encoder: FakeEncoder, client: AsyncClient
) -> None:
    encoder.failures.extend([errors.InvalidArgument(field, "cannot be decoded")] * OFTEN)
    prompt = [user("one"), assistant("two"), user("see", image(png()))]
    with pytest.raises(errors.InvalidArgument) as caught:
        await client.complete(prompt)
    assert caught.value.field == "chat.messages[2].parts[1].image"
    assert caught.value.description == "cannot be decoded"


async def test_error_is_told_in_terms_of_tokens(
    stack: Stack, encoder: FakeEncoder, client: AsyncClient
) -> None:
    placeholder = stack.config.tokens.image
    prompt = Tokens(token_ids=[placeholder, 5], images=[image(png())])
    encoder.failures.extend([errors.InvalidArgument("image", "cut short")] * OFTEN)
    with pytest.raises(errors.InvalidArgument) as caught:
        await client.complete(prompt)
    assert caught.value.field == "tokens.images[0]"


async def test_other_refusals_are_ours(encoder: FakeEncoder, client: AsyncClient) -> None:
    encoder.failures.extend([errors.InvalidArgument("header.digest", "differs")] * OFTEN)
    with pytest.raises(errors.Internal):
        await client.complete([user(image(png()))])


async def test_no_encoder_parks_vision_while_text_goes_on(
    patient: Stack, patient_client: AsyncClient
) -> None:
    parked = asyncio.create_task(patient_client.complete([user(image(png()))]))
    await until(lambda: patient.engine.load().waiting_encoder == 1)
    assert (await patient_client.complete("text goes on")).finish_reason == "stop"
    assert not parked.done()
    parked.cancel()
    await asyncio.wait({parked})


async def test_who_has_waited_for_an_encoder_in_vain_hears_so(client: AsyncClient) -> None:
    with pytest.raises(errors.Unavailable) as caught:
        await client.complete([user(image(png()))])
    assert (caught.value.reason, caught.value.retry_after_s) == ("ENCODER_UNAVAILABLE", 1.0)


async def test_parked_request_goes_on_when_the_encoder_comes(
    patient: Stack, patient_client: AsyncClient
) -> None:
    parked = asyncio.create_task(patient_client.complete([user(image(png()))]))
    await until(lambda: patient.engine.load().waiting_encoder == 1)
    await patient.add_encoder()
    assert (await parked).usage.prompt_image_tokens == 6


async def test_dead_encoder_is_replaced(stack: Stack, client: AsyncClient) -> None:
    encoders = {e.address: e for e in (await stack.add_encoder(), await stack.add_encoder())}
    data = png()
    home = rank(digest(MediaKind.IMAGE, data), stack.directory.current.encoders())[0].address
    await stack.kill(home)
    result = await client.complete([user(image(data))])
    assert result.usage.prompt_image_tokens == 6
    assert [len(e.headers) for a, e in encoders.items() if a != home] == [1]


@pytest.mark.parametrize("num_well", [0, 1])
async def test_a_file_that_brings_encoders_down_does_not_go_through_all(
    num_well: int, stack: Stack, client: AsyncClient
) -> None:
    encoders = {(e := await stack.add_encoder()).address: e for _ in range(6)}
    data = png()
    ranked = rank(digest(MediaKind.IMAGE, data), stack.directory.current.encoders())
    for member in ranked[: MAX_BREAKS + 1 - num_well]:
        encoders[member.address].breaks_off = True
    call = client.complete([user(image(data))])
    if num_well:
        assert (await call).usage.prompt_image_tokens == 6
    else:
        with pytest.raises(errors.Unavailable, match="killed by this file") as caught:
            await call
        assert caught.value.reason == "ENCODER_LOST"
    tried = [len(encoders[member.address].headers) for member in ranked]
    assert tried == [1] * (MAX_BREAKS + 1) + [0, 0]


@pytest.mark.parametrize(
    "refusal",
    [errors.Unavailable("loading"), errors.ResourceExhausted("full", retry_after_s=0.1)],
)
async def test_encoder_that_refuses_is_asked_again(
    refusal: errors.ChiasmError, encoder: FakeEncoder, client: AsyncClient
) -> None:
    encoder.failures.append(refusal)
    assert (await client.complete([user(image(png()))])).usage.prompt_image_tokens == 6
    assert len(encoder.headers) == 2


async def test_full_encoders_are_reported_as_such(
    encoder: FakeEncoder, client: AsyncClient
) -> None:
    encoder.failures.extend(
        errors.ResourceExhausted("full", reason="ENCODER_FULL", retry_after_s=2.0)
        for _ in range(50)
    )
    with pytest.raises(errors.ResourceExhausted) as caught:
        await client.complete([user(image(png()))])
    assert (caught.value.reason, caught.value.retry_after_s) == ("ENCODER_FULL", 2.0)
    # Twice, and once more where a refusal was lost.
    assert len(encoder.headers) in (2, 3), "not before the time is up or it wants to be asked"


async def test_who_waits_for_a_full_encoder_takes_another_that_comes(
    patient: Stack, patient_client: AsyncClient
) -> None:
    encoder = await patient.add_encoder()
    full = errors.ResourceExhausted("full", retry_after_s=60.0)
    encoder.failures.extend([full] * OFTEN)
    waiting = asyncio.create_task(patient_client.complete([user(image(png()))]))
    await until(lambda: encoder.headers)
    other = await patient.add_encoder()
    assert (await waiting).usage.prompt_image_tokens == 6
    # The first one again only where its refusal was lost.
    assert len(encoder.headers) in (1, 2)
    assert len(other.headers) == 1


async def test_media_held_at_once_have_a_bound(tiny_checkpoint: Path) -> None:
    data = png()
    async with running(tiny_checkpoint, max_held_media_bytes=2 * len(data) - 1) as stack:
        await stack.add_decoder()
        encoder = await stack.add_encoder()
        encoder.is_stuck = True
        async with AsyncClient(stack.address, timeout_s=20.0) as client:
            first = asyncio.create_task(client.complete([user(image(data))]))
            await until(lambda: encoder.headers)
            encoder.is_stuck = False
            with pytest.raises(errors.ResourceExhausted) as caught:
                await client.complete([user(image(data))])
            assert (caught.value.reason, caught.value.retry_after_s) == ("GATEWAY_FULL", 1.0)
            assert (await client.complete("text goes on")).finish_reason == "stop"
            first.cancel()
            await asyncio.wait({first})
            await asyncio.wait_for(encoder.cancelled.wait(), 10)
            large = [user(image(data), image(png(color="blue")), image(png(color="green")))]
            assert (await client.complete(large)).usage.prompt_image_tokens == 18


async def test_few_files_are_looked_at_at_once(
    encoder: FakeEncoder, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, counts = threading.Lock(), [0]

    def slow(source: MediaSource, **limits: int) -> MediaItem:
        with lock:
            counts.append(counts[-1] + 1)
        time.sleep(0.05)
        with lock:
            counts.append(counts[-1] - 1)
        return take_in(source, **limits)

    monkeypatch.setattr(prompts, "take_in", slow)
    data = [png(40 + i) for i in range(10)]
    await asyncio.gather(*(client.complete([user(image(d))]) for d in data))
    assert 1 <= max(counts) <= 4


async def test_cached_item_is_not_uploaded(encoder: FakeEncoder, client: AsyncClient) -> None:
    data = png()
    encoder.cached.add(digest(MediaKind.IMAGE, data))
    assert (await client.complete([user(image(data))])).usage.prompt_image_tokens == 6
    assert encoder.bytes_received == 0


@pytest.mark.parametrize(
    ("uri", "data"),
    [
        ("data:image/png;base64,AAEC", b"\0\1\2"),
        ("DATA:;base64,AAE", b"\0\1"),
        ("data:text/plain;charset=utf-8;base64,AA%3D%3D", b"\0"),
        ("data:,a%20b", b"a b"),
        ("data:application/octet-stream,%00%ff", b"\x00\xff"),
        ("data:;base64,AA\n EC", b"\0\1\2"),
    ],
)
def test_data_uri(uri: str, data: bytes) -> None:
    assert data_uri(uri, field="f", max_bytes=100) == data


@pytest.mark.parametrize("form", [";base64,", ","])
@pytest.mark.parametrize("character", ["A", "%41"])
def test_long_data_uri_is_refused_before_it_is_decoded(form: str, character: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="longer than 100 bytes") as caught:
        data_uri(f"data:{form}{character * 10_000}", field="f", max_bytes=100)
    assert caught.value.field == "f"


@pytest.mark.parametrize("shift", range(4))
def test_escapes_of_a_data_uri_take_little_memory(shift: int) -> None:
    size = 200_000
    uri = "data:," + "A" * shift + "%42" * size
    tracemalloc.start()
    try:
        data = data_uri(uri, field="f", max_bytes=size + shift)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert data == b"A" * shift + b"B" * size
    assert peak < 40 * size
