// What every page does: the token, the parts that renew themselves, and what is said to the person.
//
//   /ui/live ──versions──▶ follow ──"this part is stale"──▶ htmx GET, with If-None-Match ──▶ the part's new markup
//
// The token lives in sessionStorage: it survives a reload, no other tab and no other site sees it, and it is gone with
// the tab. It is sent as a header by these scripts alone, so a foreign page cannot make the browser send it.
"use strict";
(() => {
  const KEY = "lydian.token";
  const LONGEST_WAIT_MS = 8000; // between two tries to reach a coordinator that is away
  const TOAST_MS = 15000;
  const LARGE = 256e6; // bytes of a model that a tab should not hold in memory
  const $ = (id) => document.getElementById(id);
  const parts = () => document.querySelectorAll("[data-live]");
  const token = () => sessionStorage.getItem(KEY);
  let stream = null; // the AbortController of the open event stream
  let pressing = false; // a button that goes away under the finger would never be clicked

  // ------------------------------------------------------------ calls

  /** fetch with the token; null when the person was signed out by the answer. */
  async function call(path, options = {}) {
    const headers = { ...options.headers, Authorization: `Bearer ${token()}` };
    const answer = await fetch(path, { cache: "no-store", ...options, headers });
    if (answer.status === 401) {
      signOut(await sentence(answer));
      return null;
    }
    return answer;
  }

  /** What an answer says went wrong, in the coordinator's own words. */
  async function sentence(answer) {
    return worded(await answer.text(), answer.status);
  }

  function worded(text, status) {
    try {
      const said = JSON.parse(text);
      if (said.sentence) return [said.sentence, said.advice].filter(Boolean).join("\n");
    } catch {
      // not ours: a proxy's page, perhaps
    }
    return `The coordinator answered ${status}.`;
  }

  function toast(text, kind = "bad") {
    const box = document.createElement("div");
    box.className = `toast ${kind}`;
    box.textContent = text;
    const close = document.createElement("button");
    close.type = "button";
    close.className = "quiet";
    close.textContent = "✕";
    close.setAttribute("aria-label", "Close");
    close.addEventListener("click", () => box.remove());
    box.append(close);
    $("toasts").append(box);
    setTimeout(() => box.remove(), TOAST_MS);
  }

  function say(text) {
    if ($("said").textContent !== text) $("said").textContent = text;
  }

  // ------------------------------------------------------------ in and out

  function show() {
    const inside = Boolean(token());
    $("login").hidden = inside;
    $("page").hidden = !inside;
    $("sign-out").hidden = !inside;
    mark(document);
    if (!inside) {
      link("off", "signed out");
      $("token").focus();
    }
  }

  function signOut(why = "") {
    sessionStorage.removeItem(KEY);
    stream?.abort();
    for (const part of parts()) {
      part.replaceChildren();
      for (const name of ["version", "url", "seen", "late"]) delete part.dataset[name];
    }
    $("login-error").textContent = why;
    show();
  }

  async function signIn(event) {
    event.preventDefault();
    sessionStorage.setItem(KEY, $("token").value.trim());
    $("login-error").textContent = "";
    try {
      const answer = await call("/ui/jobs");
      if (answer === null) return;
      if (!answer.ok) return signOut(await sentence(answer));
    } catch {
      return signOut("The coordinator cannot be reached.");
    }
    $("token").value = "";
    start();
    $("main").focus();
  }

  function start() {
    show();
    if (!token()) return;
    for (const part of parts()) refresh(part);
    follow();
  }

  // ------------------------------------------------------------ what this token may do

  const MAY = { read: [], submit: ["submit"], admin: ["submit", "admin"] };

  /**
   * Why this token may not do what needs a scope, to a job that the token `owner` submitted; empty: it may. Only said
   * beforehand here, off what is public of a token: whoever presses all the same is refused by the coordinator.
   */
  function refusal({ needs, denied = needs, owner, what }) {
    const [, scope, id] = (token() ?? "").split("_");
    const may = MAY[scope];
    if (may && !may.includes(denied)) {
      const wanted = denied === "admin" ? "admin" : `${denied} or admin`;
      return `${what ?? "This"} takes a token of scope ${wanted}; this one has scope ${scope}.`;
    }
    if (may && owner !== undefined && scope !== "admin" && owner !== id) {
      return "This job was submitted with another token: that one, or one of scope admin, may pause, resume and cancel it.";
    }
    return "";
  }

  /** Take what this token may not press out of reach, and say why. */
  function mark(root) {
    for (const one of root.querySelectorAll("[data-needs]")) {
      const barred = refusal(one.dataset) !== "";
      if (one.closest(".actions, #job-form")) one.disabled = barred;
      else one.hidden = barred;
    }
    for (const one of root.querySelectorAll("[data-denied]")) {
      one.textContent = refusal(one.dataset);
      one.hidden = one.textContent === "";
    }
  }

  // ------------------------------------------------------------ parts that renew themselves

  const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      target.dataset.away = isIntersecting ? "" : "1";
      if (isIntersecting && target.dataset.late) refresh(target);
    }
  }, { rootMargin: "200px" });

  /** Have a part renewed: now, or when it is looked at and nobody is in the middle of using it. */
  function refresh(part) {
    const marked = getSelection();
    const inUse = pressing || (!marked.isCollapsed && part.contains(marked.anchorNode));
    if (!token() || document.hidden || part.dataset.away || inUse) {
      part.dataset.late = "1";
      return;
    }
    delete part.dataset.late;
    htmx.trigger(part, "stale");
  }

  function refreshLate() {
    for (const part of parts()) if (part.dataset.late) refresh(part);
  }

  function changed(versions) {
    for (const part of parts()) {
      const version = versions[part.dataset.live];
      if (version !== undefined && version !== part.dataset.seen) {
        part.dataset.seen = version;
        refresh(part);
      }
    }
  }

  function link(state, text) {
    $("link").dataset.state = state;
    if ($("link-text").textContent !== text) $("link-text").textContent = text;
  }

  /** Read server-sent events by fetch, since EventSource can send no header. Ends when it is aborted. */
  async function follow() {
    const url = document.body.dataset.liveUrl;
    stream?.abort();
    if (!url) return link("on", "signed in");
    const mine = (stream = new AbortController());
    let waits = 250;
    while (!mine.signal.aborted) {
      try {
        const answer = await call(url, { signal: mine.signal });
        if (answer === null) return;
        if (answer.status === 404 || answer.status === 403) {
          link("bad", "nothing to follow");
          return toast(await sentence(answer));
        }
        if (!answer.ok) throw new Error(await sentence(answer));
        link("on", "live");
        waits = 250;
        await read(answer.body.pipeThrough(new TextDecoderStream()).getReader());
      } catch {
        if (mine.signal.aborted) return;
      }
      link("bad", "the coordinator is away; trying again");
      await new Promise((done) => setTimeout(done, waits));
      waits = Math.min(2 * waits, LONGEST_WAIT_MS);
    }
  }

  async function read(reader) {
    let held = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const events = (held + value).split("\n\n");
      held = events.pop();
      for (const event of events) {
        const data = event.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6));
        if (data.length) changed(JSON.parse(data.join("\n")));
      }
    }
  }

  // ------------------------------------------------------------ htmx

  document.addEventListener("htmx:configRequest", ({ detail, target }) => {
    if (!token()) return;
    detail.headers.Authorization = `Bearer ${token()}`;
    const asked = detail.path + JSON.stringify([...detail.formData]);
    if (target.dataset.version && target.dataset.url === asked) detail.headers["If-None-Match"] = target.dataset.version;
    target.dataset.asked = asked;
  });

  const open = new WeakMap(); // part -> ids of what is unfolded in it
  document.addEventListener("htmx:beforeSwap", ({ target }) => {
    open.set(target, [...target.querySelectorAll("details[open]")].map((one) => one.id));
  });
  document.addEventListener("htmx:afterSwap", ({ detail, target }) => {
    for (const id of open.get(target) ?? []) if ($(id)) $(id).open = true;
    target.dataset.version = detail.xhr.getResponseHeader("ETag") ?? "";
    target.dataset.url = target.dataset.asked ?? "";
    target.removeAttribute("aria-busy");
    mark(target);
    const news = target.querySelector("[data-say]");
    if (news) say(news.dataset.say);
  });
  document.addEventListener("htmx:afterRequest", ({ detail }) => {
    if (detail.successful && detail.requestConfig.verb === "post") for (const part of parts()) refresh(part);
  });
  document.addEventListener("htmx:responseError", ({ detail, target }) => {
    const text = worded(detail.xhr.responseText, detail.xhr.status);
    if (detail.xhr.status === 401) return signOut(text);
    if (!target.dataset.live) return toast(text);
    target.textContent = text;
    target.removeAttribute("aria-busy");
  });
  document.addEventListener("htmx:sendError", ({ target }) => {
    if (target.dataset.live) target.dataset.late = "1";
    else toast("The coordinator cannot be reached; nothing was changed.");
  });

  document.addEventListener("htmx:confirm", (event) => {
    if (!event.detail.question) return;
    event.preventDefault();
    const ask = $("ask");
    $("ask-text").textContent = event.detail.question;
    ask.returnValue = "";
    ask.addEventListener("close", () => {
      if (ask.returnValue === "yes") event.detail.issueRequest(true);
    }, { once: true });
    ask.showModal();
    $("ask-no").focus();
  });

  // ------------------------------------------------------------ the person

  /** A button that changes a question: `data-set` the form, `data-field` and `data-value` what is asked for. */
  function set(form, field, value) {
    const input = $(form).elements[field];
    input.value = value;
    input.disabled = value === "";
    if (field !== "page" && $(form).elements.page) $(form).elements.page.value = "1";
    for (const part of document.querySelectorAll(`[hx-include="#${form}"]`)) refresh(part);
  }

  async function download(button) {
    const { download: path, job, flag, size } = button.dataset;
    const note = $("download-note");
    const file = `${job}.safetensors`;
    if (Number(size) > LARGE) {
      const url = new URL(path, location.href);
      note.textContent = `Too large for a tab. In a terminal: lydian pull ${job} -o ${file}${flag}\nor: curl -H "Authorization: Bearer $LYDIAN_TOKEN" -o ${file} "${url}"`;
      return;
    }
    note.textContent = "Fetching…";
    try {
      const answer = await call(path);
      if (answer === null) return;
      if (!answer.ok) {
        note.textContent = await sentence(answer);
        return;
      }
      const url = URL.createObjectURL(await answer.blob());
      const anchor = document.createElement("a");
      anchor.href = url;
      anchor.download = file;
      anchor.click();
      setTimeout(() => URL.revokeObjectURL(url), 60000);
      note.textContent = `${file} was fetched.`;
    } catch {
      note.textContent = "The coordinator cannot be reached.";
    }
  }

  function changeTheme() {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
    const next = now === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = next;
    localStorage.setItem("lydian.theme", next);
    document.dispatchEvent(new Event("lydian:theme"));
  }

  document.addEventListener("click", ({ target }) => {
    const button = target.closest("button");
    if (!button) return;
    if (button.dataset.set) set(button.dataset.set, button.dataset.field, button.dataset.value);
    if (button.dataset.download) download(button);
  });
  let typed = 0;
  document.addEventListener("input", ({ target }) => {
    const form = target.closest(".query");
    if (!form) return;
    clearTimeout(typed);
    typed = setTimeout(() => set(form.id, "page", "1"), 200);
  });
  document.addEventListener("submit", (event) => {
    if (event.target.classList.contains("query")) event.preventDefault();
  });
  document.addEventListener("pointerdown", () => (pressing = true));
  for (const name of ["pointerup", "pointercancel"]) {
    document.addEventListener(name, () => {
      pressing = false;
      setTimeout(refreshLate);
    });
  }
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) return stream?.abort();
    refreshLate();
    if (token()) follow();
  });
  document.addEventListener("DOMContentLoaded", () => {
    $("login-form").addEventListener("submit", signIn);
    $("sign-out").addEventListener("click", () => signOut());
    $("theme").addEventListener("click", changeTheme);
    for (const part of parts()) seen.observe(part);
    start();
  });

  window.lydian = { call, sentence, toast, say, signOut };
})();
