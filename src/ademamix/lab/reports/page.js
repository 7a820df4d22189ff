// Shows values of the pictures where a mouse, a finger or the arrow keys point. The page is whole without it.
"use strict";

const places = document.querySelectorAll(".picture");

JSON.parse(document.getElementById("values").textContent).forEach(({ box, names, stops }, number) => {
  if (!stops.length) return;
  const place = places[number];
  const [left, bottom, width, height] = box;  // of the axes, as parts of the picture
  const mark = place.appendChild(document.createElement("span"));
  const shown = place.appendChild(document.createElement("output"));
  let at = null;

  place.tabIndex = 0;
  place.setAttribute("role", "group");
  place.setAttribute("aria-label", "Values, by the left and right arrow keys");
  shown.hidden = mark.hidden = true;

  const row = (text, [light, dark], ...value) => {
    const line = document.createElement("span");
    line.append(text, ...value);
    line.style.color = `light-dark(${light}, ${dark})`;
    return line;
  };
  const across = ([x]) => left + x * width;
  const down = ([, y]) => 1 - bottom - (y ?? 1) * height;
  const percent = (part) => `${100 * part}%`;

  function hide() {
    at = null;
    shown.hidden = mark.hidden = true;
  }

  function show(next) {
    at = Math.min(Math.max(next, 0), stops.length - 1);
    const [x, y, head, values] = stops[at];
    const inner = names.flatMap(([name, ...colors], i) => values[i] === null ? [] : [row(`${name}: `, colors, values[i])]);
    shown.replaceChildren(head, ...inner);
    shown.hidden = mark.hidden = false;
    mark.className = y === null ? "line" : "ring";
    Object.assign(mark.style, { left: percent(across(stops[at])), top: percent(down(stops[at])), height: y === null ? percent(height) : "" });
    // On the side that the mark is not on.
    const sides = x < 0.5 ? { left: "auto", right: percent(1 - left - width) } : { left: percent(left), right: "auto" };
    Object.assign(shown.style, { top: percent(1 - bottom - height), ...sides });
  }

  function point(event) {
    const area = place.getBoundingClientRect();
    const far = (stop) => Math.hypot(
      across(stop) * area.width - (event.clientX - area.left),
      stop[1] === null ? 0 : down(stop) * area.height - (event.clientY - area.top),
    );
    show(stops.reduce((best, stop, i) => far(stop) < far(stops[best]) ? i : best, 0));
  }

  place.addEventListener("pointerdown", point);
  place.addEventListener("pointermove", point);
  place.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
  place.addEventListener("blur", hide);
  place.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    show((at ?? (step < 0 ? stops.length : -1)) + step);
  });
});
