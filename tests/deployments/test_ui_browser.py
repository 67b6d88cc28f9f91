"""The trajectory viewer in a real browser (Chromium), over a gateway with made-up trajectories."""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from cluster.ports import free_ports
from deployments.gateway import make_app
from deployments.token_text import TokenizerText
from rollout.access import AccessKey, AccessSettings, hash_key
from rollout.api import RunRequest
from rollout.errors import UnavailableError
from rollout.loading import Snapshot
from tests.actors.service import Service, tasks
from tests.deployments.viewing import LONG_TOKENS, MODEL, Shown, StillLoading, Writer, fill, finish, tokenizer

async_api = pytest.importorskip("playwright.async_api", reason="the viewer's tests need the package playwright")

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the viewer's tests need Debian's package chromium")

KEY = "k" * 40
LONG = "#/t/terminal-agent/nightly/../job/0"
DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}
# Bounds are many times what it takes on an idle machine: they are there to notice quadratic work, not milliseconds.
TOKENS_READY_S = 15.0
MODE_MS = 1_500
FRAME_MS = 400
"""Every frame, median, of a scroll through all tokens."""


class Site:
    """A gateway on a port of its own."""

    def __init__(self, service: Service, backend: Any = None, **options: Any) -> None:
        shown = backend or Shown(service)
        app = make_app(lambda: shown, 50_000, token_text=TokenizerText(str(MODEL)), **options)  # type: ignore[arg-type, return-value]
        (self.port,) = free_ports(1)
        self.server = uvicorn.Server(
            uvicorn.Config(app, port=self.port, log_level="critical", timeout_graceful_shutdown=1)
        )
        self.address = f"http://127.0.0.1:{self.port}/ui/"
        self.running: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Site:
        self.running = asyncio.create_task(self.server.serve())
        async with asyncio.timeout(10):
            while not self.server.started:
                await asyncio.sleep(0.02)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.running is not None
        self.server.should_exit = True
        await self.running


class ComingUp(Shown):
    """A cluster that starts until it is told that it is ready."""

    ready = False

    def __getattribute__(self, name: str) -> Any:
        if name in ("runs", "weights", "trajectories", "trajectory", "history") and not self.ready:
            return self._refuse
        return super().__getattribute__(name)

    async def _refuse(self, *_: object) -> Any:
        raise UnavailableError("the cluster is starting and not ready yet")


class NothingYet(StillLoading):
    """A board to which no engine has come."""

    async def snapshot(self) -> Snapshot:
        return Snapshot("nothing", 2, 0, [])


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    made = Service(tmp_path / "journal.sqlite")
    await fill(made, tasks=24, group_size=4)
    yield made
    await made.close()


@pytest.fixture
async def browser() -> AsyncIterator[Any]:
    async with async_api.async_playwright() as playwright:
        # A container has no user namespaces for Chromium's sandbox; the pages are our own.
        made = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        await made.close()


@pytest.fixture
async def page(browser: Any) -> AsyncIterator[Any]:
    opened = await browser.new_page(viewport=DESKTOP)
    opened.set_default_timeout(10_000)
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("request", lambda request: None if "127.0.0.1" in request.url else problems.append(request.url))
    opened.on(
        "console", lambda message: problems.append(message.text) if "Content Security" in message.text else None
    )
    yield opened
    assert problems == []


async def texts(page: Any, selector: str) -> list[str]:
    return [text.strip() for text in await page.locator(selector).all_inner_texts()]


async def until(page: Any, expression: str) -> None:
    # Playwright's own way evaluates text in the page, which the page's policy forbids.
    async with asyncio.timeout(10):
        while not await page.evaluate(expression):
            await asyncio.sleep(0.05)


async def test_the_overview_is_live(service: Service, page: Any):
    async with Site(service, board=StillLoading()) as site:
        await page.goto(site.address)
        await page.get_by_role("heading", name="Runs").wait_for()
        expect = async_api.expect
        await expect(page.locator(".pulse")).to_have_text("v6 · 2 engines")
        assert await texts(page, ".run-name") == ["calculator-grpo", "terminal-agent"]
        run = page.locator(".run").first
        await expect(run.locator(".badge")).to_have_text("running")
        await expect(run.locator(".parts")).to_have_attribute(
            "aria-label", "groups: delivered 8, leased 3, ready 12, running 10, dropped 1"
        )
        await expect(page.locator(".engines")).to_contain_text("layer 18 of 36")
        await expect(page.locator(".plot .dot").first).to_be_visible()
        before = await run.locator(".facts").inner_text()
        await service.finish(list(service.held.values())[:4])
        # At once, over the run's events, and not with the next look.
        await expect(run.locator(".facts")).not_to_have_text(before, timeout=5_000)
        await page.keyboard.press("j")
        await expect(page.locator(".run.current .run-name")).to_have_text("terminal-agent")
        await expect(page.locator("#course-title")).to_have_text("Over time: terminal-agent")


async def test_the_list_by_keyboard_and_filters(service: Service, page: Any):
    expect = async_api.expect
    async with Site(service) as site:
        await page.goto(site.address)
        await page.get_by_role("heading", name="Runs").wait_for()
        await page.keyboard.press("g")
        await page.keyboard.press("t")
        await expect(page.locator(".summary")).to_have_text("97 trajectories")
        assert await page.locator(".rows > li").count() == 50
        await page.get_by_role("button", name="More").click()
        await expect(page.locator(".rows > li")).to_have_count(97)
        await page.get_by_role("button", name="tool_error").click()
        await expect(page.locator(".summary")).to_contain_text("of 97 trajectories")
        assert set(await texts(page, ".rows .badge")) == {"tool_error"}
        assert "stop_reason=tool_error" in page.url
        await page.reload()
        await expect(page.get_by_role("button", name="tool_error")).to_have_attribute("aria-pressed", "true")
        await page.keyboard.press("x")
        await expect(page.locator(".summary")).to_have_text("97 trajectories")
        await page.keyboard.press("/")
        await page.keyboard.type("groß ist seine")
        await expect(page).to_have_url(re.compile("seine"))
        await expect(page.locator(".rows:not([aria-busy])")).to_be_visible()
        await expect(page.locator(".summary")).to_contain_text("of 97")
        assert all("Fläche" in text for text in await texts(page, ".opening"))
        await page.keyboard.press("Escape")
        await page.keyboard.press("j")
        await page.keyboard.press("j")
        chosen = await page.locator(".rows .current .id").inner_text()
        assert chosen == (await texts(page, ".rows .id"))[1]
        await page.keyboard.press("Enter")
        await expect(page.locator(".title h1")).to_have_text(chosen)
        await page.keyboard.press("]")
        await expect(page.locator(".title h1")).not_to_have_text(chosen)
        await page.keyboard.press("Escape")
        await expect(page.get_by_role("searchbox")).to_have_value("groß ist seine")


async def test_new_ones_wait_to_be_asked_for(service: Service, page: Any):
    expect = async_api.expect
    async with Site(service) as site:
        await page.goto(f"{site.address}#/trajectories?run=calculator-grpo")
        await expect(page.locator(".summary")).to_have_text("96 trajectories")
        first = (await texts(page, ".rows .id"))[0]
        await service.finish(list(service.held.values())[:3])
        await page.get_by_role("button", name="3 new").click(timeout=12_000)
        await expect(page.locator(".summary")).to_have_text("99 trajectories")
        assert (await texts(page, ".rows .id"))[3] == first


# What every view shows once there is a cluster.
VIEWS = [("#/", ".run-name"), ("#/trajectories", ".rows a"), (LONG, ".message")]


@pytest.mark.parametrize(("view", "content"), VIEWS)
async def test_a_page_that_is_opened_while_the_cluster_starts_goes_on_by_itself(
    service: Service, page: Any, view: str, content: str
):
    expect = async_api.expect
    backend = ComingUp(service)
    async with Site(service, backend, board=StillLoading()) as site:
        await page.goto(site.address + view)
        await expect(page.locator("main > .notice")).to_have_text(
            "The cluster is starting and not ready yet. This page tries again by itself."
        )
        await expect(page.locator(".pulse")).to_have_text("starting")
        # Later failures take nothing away either.
        await asyncio.sleep(2.5)
        await expect(page.locator("main .loading")).to_be_visible()
        assert await page.locator(".empty").count() == 0 and await page.locator(content).count() == 0
        backend.ready = True
        await expect(page.locator(content).first).to_be_visible(timeout=15_000)
        await expect(page.locator("main > .notice:visible, main .loading")).to_have_count(0)
        await expect(page.locator(".pulse")).to_have_text("v6 · 2 engines", timeout=15_000)


async def test_engines_are_shown_loading_before_anything_else_is_there(service: Service, page: Any):
    expect = async_api.expect
    async with Site(service, ComingUp(service), board=StillLoading()) as site:
        await page.goto(site.address)
        await expect(page.locator(".engines")).to_contain_text("layer 18 of 36")
        await expect(page.locator(".runs")).to_have_text("Looking…")
    async with Site(service, ComingUp(service), board=NothingYet()) as site:
        await page.goto(site.address)
        await expect(page.locator(".engines")).to_contain_text("none of the engine replicas has started yet")


@pytest.mark.parametrize(("view", "content"), VIEWS)
async def test_a_page_that_reaches_nobody_goes_on_by_itself(service: Service, page: Any, view: str, content: str):
    expect = async_api.expect
    async with Site(service) as site:
        await page.route("**/v1/**", lambda route: route.abort())
        await page.goto(site.address + view)
        await expect(page.locator("main > .notice")).to_contain_text("`rollout status` says where its gateway is")
        await page.unroute("**/v1/**")
        await expect(page.locator(content).first).to_be_visible(timeout=15_000)
        await expect(page.locator("main > .notice:visible, main .loading")).to_have_count(0)


async def test_what_is_shown_stays_while_the_cluster_is_away(service: Service, page: Any):
    expect = async_api.expect
    async with Site(service) as site:
        await page.goto(f"{site.address}#/trajectories")
        await expect(page.locator(".summary")).to_have_text("97 trajectories")
        await page.get_by_role("button", name="More").click()
        await expect(page.locator(".rows > li")).to_have_count(97)
        await page.route("**/v1/**", lambda route: route.abort())
        await expect(page.locator("main > .notice")).to_be_visible(timeout=12_000)
        await expect(page.locator(".rows > li")).to_have_count(97)
        await page.unroute("**/v1/**")
        await expect(page.locator("main > .notice")).to_be_hidden(timeout=15_000)
        # Not even moved to its beginning.
        await expect(page.locator(".rows > li")).to_have_count(97)


async def test_a_conversation(service: Service, page: Any):
    expect = async_api.expect
    async with Site(service) as site:
        await page.goto(f"{site.address}#/trajectories?run=calculator-grpo&forks=true")
        await page.locator(".rows a").first.click()
        await page.locator(".message").first.wait_for()
        roles = [text.split("\n")[0] for text in await texts(page, ".message .role")]
        assert roles == ["system", "user", "assistant", "calculator", "assistant", "user", "assistant"]
        await expect(page.locator(".forked")).to_contain_text(
            "Segment 2 begins with the next turn: qwen3 does not extend"
        )
        await expect(page.locator(".call .arguments")).to_contain_text("expression")
        await expect(page.locator(".m-tool header")).to_contain_text("s")
        reasoning = page.locator(".reasoning .text").first
        await expect(reasoning).to_be_hidden()
        await page.keyboard.press("e")
        await expect(reasoning).to_be_visible()
        assert await page.locator(".siblings a").count() == 4
        # From a turn to its tokens.
        await page.locator(".message .link").last.click()
        await expect(page.get_by_role("tab", name="Tokens")).to_have_attribute("aria-selected", "true")
        await expect(page.locator(".segment-tabs [aria-pressed=true]")).to_contain_text("Segment 2")
        assert "segment=1" in page.url


async def test_what_a_model_writes_is_text_and_nothing_else(service: Service, page: Any):
    bad = '<img src=x onerror="document.title=1"><script>document.title = "2"</script> **b**'
    await service.runs.create(RunRequest(name="bad", group_size=1))
    await service.runs.submit("bad", tasks(1))
    (assignment,) = service.start()
    writer = Writer(tokenizer(), random.Random(1), assignment.key, 0)
    writer.messages.append({"role": "user", "content": bad})
    writer.open()
    writer.say(bad, bad, {"name": bad, "arguments": {bad: bad}})
    writer.answer(bad, bad, 0.1, f"exception: {bad}")
    await finish(service, [writer.done("error", None, f"engine: {bad}")])
    async with Site(service) as site:
        await page.goto(f"{site.address}#/trajectories?run=bad")
        await async_api.expect(page.locator(".opening")).to_have_text(bad)
        await page.locator(".rows a").click()
        await async_api.expect(page.locator(".m-user .text")).to_have_text(bad)
        await page.keyboard.press("2")
        await page.locator(".stream[data-complete]").wait_for()
        assert await page.locator("main img, main script").count() == 0
        assert "rollout" in await page.title()


async def test_ten_thousand_tokens_stay_smooth(service: Service, page: Any):
    expect = async_api.expect
    async with Site(service) as site:
        await page.goto(f"{site.address}{LONG}?view=tokens")
        stream = page.locator(".stream[data-complete]")
        await stream.wait_for(timeout=TOKENS_READY_S * 1000)
        total = int(await stream.get_attribute("data-complete"))
        assert total > LONG_TOKENS
        # Only what is near has elements at first; in the end the whole text is there for the browser's own search.
        await expect(page.locator(".stream .t")).to_have_count(total, timeout=TOKENS_READY_S * 1000)
        text = await page.evaluate("document.querySelector('.stream').textContent")
        assert text.count("<|im_start|>assistant") == 20 and "It now gives up after three attempts." in text
        took = await page.evaluate(
            """async () => {
                const frame = () => new Promise(requestAnimationFrame);
                const took = {};
                for (const key of ["2", "3", "4", "1"]) {
                    const begun = performance.now();
                    document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
                    await frame(); await frame();
                    took[key] = performance.now() - begun;
                }
                const frames = [];
                for (let y = 0; y < document.documentElement.scrollHeight; y += 700) {
                    const begun = performance.now();
                    scrollTo(0, y);
                    await frame();
                    frames.push(performance.now() - begun);
                }
                frames.sort((a, b) => a - b);
                const modes = Math.max(...Object.values(took));
                return {modes, median: frames[frames.length >> 1], worst: frames.at(-1)};
            }"""
        )
        figures = ", ".join(f"{name} {value:.0f} ms" for name, value in took.items())
        print(f"{total} tokens: {figures}")
        assert took["modes"] < MODE_MS and took["median"] < FRAME_MS
        await expect(page.locator(".map-frame")).to_be_visible()


async def test_one_token_told(service: Service, page: Any):
    expect = async_api.expect
    async with Site(service) as site:
        await page.goto(f"{site.address}{LONG}?view=tokens&colour=logprob")
        await page.locator(".stream[data-complete]").wait_for()
        token = page.locator(".stream .t.s").nth(10)
        await token.hover()
        tip = page.get_by_role("tooltip")
        told = " ".join((await tip.inner_text()).split())
        index = await token.evaluate("element => element.index")
        for part in ("id ", f"position {index}", "logprob −", "version v6", "in turn 1", "%"):
            assert part in told
        await page.mouse.move(5, 5)
        await expect(tip).to_be_hidden()
        await token.click()
        await page.keyboard.press("ArrowRight")
        await expect(tip).to_contain_text(f"{index + 1}")
        assert await page.evaluate("document.querySelector('.t.at').index") == index + 1
        await page.keyboard.press("Escape")
        await expect(tip).to_be_hidden()
        for number, name in enumerate(("mask", "logprob", "version", "reward"), start=1):
            await page.keyboard.press(str(number))
            await expect(page.locator(".stream")).to_have_attribute("data-colour", name)
            await expect(page.locator('.modes [aria-checked="true"]')).to_have_attribute("data-mode", name)
            colours = await page.evaluate(
                """[...new Set([...document.querySelectorAll('.stream .t.s')]
                    .map((one) => getComputedStyle(one).backgroundColor))]"""
            )
            assert len(colours) == {"mask": 1, "logprob": 8, "version": 4, "reward": 1}[name]
            assert "rgba(0, 0, 0, 0)" not in colours
        await page.keyboard.press("n")
        await expect(tip).to_be_visible()
        # A press on the strip goes there.
        box = await page.locator(".map").bounding_box()
        await page.mouse.click(box["x"] + box["width"] * 0.9, box["y"] + 10)
        await until(page, "scrollY > document.documentElement.scrollHeight / 2")


async def test_the_id_is_copied(service: Service, page: Any):
    async with Site(service) as site:
        await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        await page.goto(f"{site.address}{LONG}")
        await page.get_by_role("button", name="Copy the id").click()
        await async_api.expect(page.locator(".toast")).to_have_text("Id copied")
        assert await page.evaluate("navigator.clipboard.readText()") == "terminal-agent/nightly/../job/0"


async def test_a_locked_cluster_asks_for_a_key(service: Service, page: Any):
    expect = async_api.expect
    keys = (AccessKey("me", hash_key(KEY), frozenset({"trainer"})),)
    async with Site(service, access=AccessSettings(keys=keys)) as site:
        await page.goto(f"{site.address}#/trajectories")
        box = page.get_by_role("dialog")
        await box.get_by_label("API key").fill("wrong")
        await page.keyboard.press("Enter")
        await expect(box).to_contain_text("The API key is not known")
        await box.get_by_label("API key").fill(KEY)
        await page.keyboard.press("Enter")
        await expect(page.locator(".summary")).to_have_text("97 trajectories")
        stored = await page.evaluate(
            "[JSON.stringify(sessionStorage), JSON.stringify(localStorage), document.cookie]"
        )
        assert KEY in stored[0] and KEY not in stored[1] + stored[2] and KEY not in page.url
        # Streams carry the key too.
        async with page.expect_response(lambda response: "/events" in response.url) as events:
            await page.goto(f"{site.address}#/")
        assert (await events.value).status == 200
        await page.get_by_role("button", name="API key").click()
        await page.get_by_role("button", name="Forget the key").click()
        await expect(page.locator(".pulse")).to_have_text("locked")


async def test_dark_and_light(service: Service, browser: Any):
    expect = async_api.expect
    async with Site(service) as site:
        shades = {}
        for scheme in ("light", "dark"):
            page = await browser.new_page(color_scheme=scheme)
            await page.goto(site.address)
            background = "getComputedStyle(document.body).backgroundColor"
            shades[scheme] = await page.evaluate(background)
            body = expect(page.locator("body"))
            await page.emulate_media(color_scheme="light" if scheme == "dark" else "dark")
            await body.not_to_have_css("background-color", shades[scheme])
            await page.emulate_media(color_scheme=scheme)
            await body.to_have_css("background-color", shades[scheme])
            switch = page.get_by_role("button", name="Colours")
            await switch.click()
            assert await switch.get_attribute("aria-label") == "Colours: light"
            light = await page.evaluate(background)
            await page.keyboard.press("d")
            dark = await page.evaluate(background)
            await page.reload()
            assert await page.evaluate(background) == dark != light
            await page.close()
        assert shades["light"] == light and shades["dark"] == dark


@pytest.mark.parametrize("view", ["#/", "#/trajectories", LONG, f"{LONG}?view=tokens&colour=logprob"])
async def test_a_phone_shows_it_without_scrolling_sideways(service: Service, browser: Any, view: str):
    async with Site(service, board=StillLoading()) as site:
        page = await browser.new_page(viewport=PHONE, has_touch=True)
        await page.goto(site.address + view)
        await page.locator(".run, .rows li, .message, .stream[data-complete]").first.wait_for()
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        if "tokens" in view:
            await page.locator(".stream .t.s").nth(3).tap()
            await async_api.expect(page.get_by_role("tooltip")).to_contain_text("logprob")
        await page.close()


async def test_help_names_the_keys_and_everything_has_a_name(service: Service, page: Any):
    async with Site(service) as site:
        for view in ("#/", "#/trajectories", LONG, f"{LONG}?view=tokens"):
            await page.goto(site.address + view)
            await page.locator(".run, .rows li, .message, .stream[data-complete]").first.wait_for()
            nameless = await page.evaluate(
                """[...document.querySelectorAll("button, a, input, select")].filter((one) => one.checkVisibility()
                    && !(one.getAttribute("aria-label") || one.textContent.trim() || one.labels?.length))
                    .map((one) => one.outerHTML)"""
            )
            assert nameless == []
            await page.keyboard.press("?")
            await async_api.expect(page.get_by_role("dialog")).to_contain_text("Keyboard")
            await page.keyboard.press("Escape")
            await async_api.expect(page.get_by_role("dialog")).to_be_hidden()
