// The form of a job: what was entered becomes the job that is sent; what the coordinator refuses is shown at its field.
"use strict";
(() => {
  const RATES = ["train.lr", "train.momentum", "train.weight_decay"]; // a task's are meant for sgd
  const LENGTHS = ["train.local_epochs", "train.local_steps", "train.local_seconds"]; // a job has one of them
  const NAME = /^[A-Za-z0-9._-]{1,63}$/;
  const $ = (id) => document.getElementById(id);
  const form = $("job-form");
  const inputs = [...form.querySelectorAll("[data-key]")];
  const at = (path) => inputs.find((input) => input.dataset.key === path);
  let key = newKey();

  /** The same key again gives the same job: a second click, or an answer that was lost, makes no second one. */
  function newKey() {
    return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  }

  // ------------------------------------------------------------ a task's defaults

  function chosen() {
    return form.querySelector("input[name=task]:checked");
  }

  function fill() {
    const task = chosen();
    $("file-field").hidden = task.value !== "";
    for (const input of inputs) {
      if (input.dataset.fromTask) {
        input.value = "";
        delete input.dataset.fromTask;
      }
    }
    const defaults = JSON.parse(task.dataset.defaults ?? "{}");
    for (const [path, value] of Object.entries(defaults)) {
      const input = at(path);
      if (input && input.value === "" && suits(path)) {
        input.value = String(value);
        input.dataset.fromTask = "1";
      }
    }
    count();
  }

  function suits(path) {
    const optimizer = at("train.optimizer").value;
    if (RATES.includes(path) && optimizer !== "" && optimizer !== "sgd") return false;
    return !LENGTHS.includes(path) || LENGTHS.every((length) => at(length).value === "" || at(length).dataset.fromTask);
  }

  function count() {
    for (const badge of form.querySelectorAll("[data-changed]")) {
      const set = inputs.filter((one) => one.value !== "" && one.dataset.key.startsWith(`${badge.dataset.changed}.`));
      badge.textContent = set.length ? `${set.length} set` : "";
    }
  }

  // ------------------------------------------------------------ what is sent

  function number(text) {
    return /^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$/i.test(text) ? Number(text) : text;
  }

  function value(input) {
    const text = input.value.trim();
    const words = (input.dataset.words ?? "").split(" ");
    switch (input.dataset.kind) {
      case "choice":
        return text === "true" ? true : text === "false" ? false : text;
      case "number":
        return number(text);
      case "list":
        return words.includes(text) && text !== "" ? text : text.split(",").map((one) => number(one.trim()));
      default:
        return text;
    }
  }

  function config(task) {
    const given = JSON.parse(task.dataset.config ?? "{}");
    for (const line of $("key-config").value.split("\n").filter((one) => one.trim() !== "")) {
      const [name, ...rest] = line.split("=");
      if (!rest.length) throw { path: "config", text: `"${line.trim()}" is not NAME = VALUE` };
      const text = rest.join("=").trim();
      try {
        given[name.trim()] = JSON.parse(text);
      } catch {
        given[name.trim()] = text;
      }
    }
    return given;
  }

  async function request() {
    const task = chosen();
    const spec = { task: task.value };
    const made = { spec, key };
    if (task.value === "") {
      const file = $("task-file").files[0];
      if (!file) throw { path: "task", text: "Choose a task file." };
      spec.task = file.name.replace(/\.py$/, "");
      if (!NAME.test(spec.task)) throw { path: "task", text: `${file.name} is no name for a task: letters, digits, dots, dashes and underscores, at most 63.` };
      if (file.size > 1 << 20) throw { path: "task", text: `${file.name} has ${file.size} bytes, and 1,048,576 are the most.` };
      made.task_source = await file.text();
    }
    for (const input of inputs.filter((one) => one.value.trim() !== "")) {
      const [section, leaf] = input.dataset.key.split(".");
      if (leaf === undefined) spec[section] = value(input);
      else (spec[section] ??= {})[leaf] = value(input);
    }
    const held = config(task);
    if (Object.keys(held).length) spec.config = held;
    return made;
  }

  // ------------------------------------------------------------ what is refused

  function clear() {
    for (const line of form.querySelectorAll(".error")) line.textContent = "";
    for (const input of form.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
  }

  function blame(path, text) {
    const place = $(path === "" ? "form-error" : `key-${path.replace(".", "-")}-error`);
    if (place === null) return false;
    place.textContent = [place.textContent, text].filter(Boolean).join(" · ");
    const input = at(path);
    input?.setAttribute("aria-invalid", "true");
    const section = place.closest("details");
    if (section) section.open = true;
    return true;
  }

  /** The API says `spec.train.lr: Input should be greater than 0; spec.rounds: …`; each goes to its field. */
  function refused(sentence) {
    for (const fault of sentence.split(/; (?=spec\b[^:;]*: )/)) {
      const found = /^spec((?:\.[^:]*)?): ([^]*)$/.exec(fault);
      const steps = found ? found[1].slice(1).split(".") : [];
      const text = (found ? found[2] : fault).replace(/^Value error, /, "");
      while (!blame(steps.slice(0, 2).join("."), text)) steps.length = Math.min(steps.length, 2) - 1;
    }
    const first = form.querySelector("[aria-invalid]") ?? [...form.querySelectorAll(".error")].find((one) => one.textContent);
    (first?.matches("input, select, textarea") ? first : first?.closest("details")?.querySelector("summary") ?? $("form-error")).focus();
    const shown = [...form.querySelectorAll(".error")].filter((one) => one.textContent).length;
    $("submit-note").textContent = `Not submitted: ${shown} ${shown === 1 ? "place needs" : "places need"} a look.`;
  }

  async function submit(event) {
    event.preventDefault();
    clear();
    $("submit-note").textContent = "Submitting…";
    $("submit-job").disabled = true;
    try {
      const body = JSON.stringify(await request());
      const answer = await lydian.call("/v1/jobs", { method: "POST", headers: { "Content-Type": "application/json" }, body });
      if (answer === null) return;
      if (answer.ok) {
        location.assign(`/jobs/${encodeURIComponent((await answer.json()).id)}`);
        return;
      }
      const text = await answer.text();
      let said = null;
      try {
        said = JSON.parse(text);
      } catch {
        // not ours: a proxy's page, perhaps
      }
      refused(said?.sentence ?? `The coordinator answered ${answer.status}.`);
    } catch (error) {
      if (error.path) {
        blame(error.path, error.text);
        $("submit-note").textContent = "Not submitted.";
      } else {
        refused("The coordinator cannot be reached; the same button tries again, and makes no second job.");
      }
    } finally {
      $("submit-job").disabled = false;
    }
  }

  form.addEventListener("submit", submit);
  form.addEventListener("change", ({ target }) => {
    key = newKey(); // another job than the one that was refused or sent
    if (target.name === "task" || target.dataset.key === "train.optimizer" || LENGTHS.includes(target.dataset.key)) fill();
  });
  form.addEventListener("input", ({ target }) => {
    delete target.dataset.fromTask;
    count();
  });
  fill();
})();
