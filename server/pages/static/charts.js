// Curves of a job: fetched once, then only what is new; thinned out again when they have grown long.
"use strict";
(() => {
  const LONG = 3000; // points
  const HEIGHT = 220;
  const LOSSES = /loss|error|perplexity/;
  const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3]];
  const box = document.getElementById("curves");
  let rounds = [];
  let curves = {}; // metric -> values, as long as rounds
  let until = 0;
  let [busy, again] = [false, false];
  let plots = []; // {plot, names}

  /** One fetch at a time; word that comes meanwhile is one more, after it. */
  async function renew() {
    again = true;
    if (busy) return;
    busy = true;
    try {
      while (again) {
        again = false;
        await load(rounds.length > LONG ? 0 : Math.max(0, until - 20)); // an evaluation comes after its round
        draw();
      }
    } finally {
      busy = false;
    }
  }

  async function load(after) {
    let answer;
    try {
      answer = await lydian.call(`${box.dataset.series}?after=${after}`);
    } catch {
      box.dataset.late = "1";
      return;
    }
    if (answer === null) return;
    if (!answer.ok) {
      box.textContent = await lydian.sentence(answer);
      return;
    }
    const fresh = await answer.json();
    const kept = rounds.findIndex((round) => round > after);
    const old = after === 0 ? 0 : kept < 0 ? rounds.length : kept;
    const names = Object.keys(fresh.curves);
    curves = Object.fromEntries(names.map((name) => {
      const before = after === 0 ? [] : (curves[name] ?? new Array(rounds.length).fill(null)).slice(0, old);
      return [name, [...before, ...fresh.curves[name]]];
    }));
    rounds = [...(after === 0 ? [] : rounds.slice(0, old)), ...fresh.rounds];
    until = fresh.until;
  }

  /** Metrics that belong into one picture: what should fall, what should rise, and the privacy that was spent. */
  function groups() {
    const names = Object.keys(curves).filter((name) => curves[name].some((value) => value !== null)).sort();
    const losses = names.filter((name) => LOSSES.test(name));
    const spent = names.filter((name) => name === "epsilon");
    const others = names.filter((name) => !losses.includes(name) && !spent.includes(name));
    return [["Loss", losses], ["Quality", others], ["Privacy spent, ε", spent]].filter(([, held]) => held.length);
  }

  function draw() {
    const wanted = groups();
    if (!wanted.length) {
      clear("Nothing was measured yet.");
      return;
    }
    const same = plots.length === wanted.length && plots.every(({ names }, at) => String(names) === String(wanted[at][1]));
    if (!same) {
      clear();
      plots = wanted.map(([title, names]) => make(title, names));
    }
    for (const { plot, names, figure, title } of plots) {
      plot.setData([rounds, ...names.map((name) => curves[name])]);
      figure.setAttribute("aria-label", `${title}: ${names.map((name) => `${name} ${last(name)}`).join(", ")}`);
    }
  }

  function clear(text) {
    for (const { plot } of plots) plot.destroy();
    plots = [];
    box.replaceChildren();
    if (text) {
      const line = document.createElement("p");
      line.className = "wait";
      line.textContent = text;
      box.append(line);
    }
  }

  function last(name) {
    const value = curves[name].findLast((one) => one !== null);
    return value === undefined || value === null ? "not measured" : shown(value);
  }

  function shown(value) {
    if (value === null || value === undefined) return "–";
    return Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5 ? value.toFixed(3) : value.toPrecision(3);
  }

  function make(title, names) {
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent = title;
    figure.append(caption);
    box.append(figure);
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = { stroke: colour("--muted"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false } };
    axis.font = "12px system-ui, sans-serif";
    const plot = new uPlot({
      width: figure.clientWidth || 300,
      height: HEIGHT,
      scales: { x: { time: false } },
      axes: [{ ...axis, size: 32, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 50000, 100000] }, { ...axis, size: 52 }],
      cursor: { y: false, points: { size: 7 } },
      series: [
        { label: "round" },
        ...names.map((name, at) => ({
          label: name,
          stroke: colour(`--curve-${at % 4}`),
          width: 2,
          dash: DASHES[at % 4],
          spanGaps: true,
          points: { show: rounds.length < 40, size: 5 },
          value: (_, value) => shown(value),
        })),
      ],
    }, [rounds, ...names.map((name) => curves[name])], figure);
    return { plot, names, figure, title };
  }

  document.addEventListener("lydian:theme", () => {
    clear();
    draw();
  });
  new ResizeObserver(() => {
    for (const { plot, figure } of plots) plot.setSize({ width: figure.clientWidth, height: HEIGHT });
  }).observe(box);
  box.addEventListener("stale", renew);
})();
