// A line over time, without axes: the figure beside it says what it is now.

const SVG = "http://www.w3.org/2000/svg";

function shape(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

/** Draws `values`, the newest at the right, on a chart with room for `room` of them. */
export function draw(svg, values, room) {
  const width = room - 1;
  const height = 40;
  const top = Math.max(1, ...values);
  const x = (index) => width - (values.length - 1 - index);
  const y = (value) => height - 1 - (value / top) * (height - 4);
  const points = values.map((value, index) => `${x(index)},${y(value).toFixed(2)}`);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  const ground = shape("line", { class: "ground", x1: 0, x2: width, y1: height - 0.5, y2: height - 0.5 });
  if (points.length < 2) {
    svg.replaceChildren(ground);
    return;
  }
  const line = points.join(" ");
  svg.replaceChildren(
    ground,
    shape("polygon", { class: "area", points: `${x(0)},${height} ${line} ${width},${height}` }),
    shape("polyline", { class: "curve", points: line }),
  );
}
