"use strict";

const $ = (id) => document.getElementById(id);

function element(name, text, className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

// Follows the references of a schema.
function resolved(schema, api) {
  while (schema?.$ref) schema = schema.$ref.split("/").slice(1).reduce((at, key) => at?.[key], api);
  return schema ?? {};
}

function kind(schema, api, depth = 0) {
  const found = resolved(schema, api);
  const choices = found.anyOf ?? found.oneOf;
  if (choices) return choices.filter(({ type }) => type !== "null").map((choice) => kind(choice, api, depth)).join(" or ");
  if (found.const !== undefined) return JSON.stringify(found.const);
  if (found.enum) return found.enum.map((one) => JSON.stringify(one)).join(" or ");
  if (found.type === "array") return depth > 2 ? "list" : `list of ${kind(found.items, api, depth + 1)}`;
  return found.title && found.properties ? found.title : (found.type ?? "any");
}

const BOUNDS = [["minimum", "≥"], ["exclusiveMinimum", ">"], ["maximum", "≤"], ["exclusiveMaximum", "<"], ["minItems", "at least"], ["maxItems", "at most"]];
function bounds(schema, api) {
  const found = resolved(schema, api);
  const all = [found, ...(found.anyOf ?? []).map((one) => resolved(one, api))];
  return BOUNDS.map(([key, sign]) => [all.find((one) => one[key] !== undefined)?.[key], sign])
    .filter(([value]) => value !== undefined && Math.abs(value) <= Number.MAX_SAFE_INTEGER).map(([value, sign]) => `${sign} ${value}`).join(", ");
}

function table(headings, rows) {
  const made = document.createElement("table");
  const head = made.createTHead().insertRow();
  for (const heading of headings) head.append(Object.assign(element("th", heading), { scope: "col" }));
  const body = made.createTBody();
  for (const cells of rows) {
    const tr = body.insertRow();
    cells.forEach((cell, index) => {
      const made = index ? document.createElement("td") : Object.assign(document.createElement("th"), { scope: "row" });
      made.append(index > 1 ? cell : element("code", cell));
      tr.append(made);
    });
  }
  return made;
}

// Tables of the fields of an object, and of the objects in it.
function fields(schema, api, seen = new Set()) {
  const found = resolved(schema, api);
  if (!found.properties || seen.has(found.title)) return [];
  seen.add(found.title);
  const tables = [];
  if (seen.size > 1) tables.push(element("p", found.title, "soft"));
  tables.push(table(["Field", "Type", "Default", "Bounds", ""], Object.entries(found.properties).map(([name, field]) => [
    name, kind(field, api), found.required?.includes(name) ? "required" : JSON.stringify(field.default ?? null),
    bounds(field, api), field.description ?? "",
  ])));
  const inner = (schema) => {
    const one = resolved(schema, api);
    return [one, ...[one.items, ...(one.anyOf ?? []), ...(one.oneOf ?? [])].filter(Boolean).flatMap(inner)];
  };
  for (const field of Object.values(found.properties)) {
    for (const one of inner(field)) tables.push(...fields(one, api, seen));
  }
  return tables;
}

function operation(path, method, said, api) {
  const made = document.createElement("details");
  const summary = document.createElement("summary");
  summary.append(element("span", method.toUpperCase(), "method"), element("h2", path), element("span", said.description ?? "", "soft"));
  const inside = element("div", "", "inside");
  const body = said.requestBody?.content["application/json"]?.schema;
  if (said.parameters) inside.append(table(["In the path", "Type"], said.parameters.map(({ name, schema }) => [name, kind(schema, api)])));
  if (body) inside.append(...fields(body, api));
  inside.append(table(["Status", "", ""], Object.entries(said.responses).map(([status, { description }]) => [status, "", description])));
  made.append(summary, inside);
  return made;
}

async function show() {
  const answer = await fetch("openapi.json");
  if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
  const api = await answer.json();
  $("title").textContent = `${api.info.title} ${api.info.version}`;
  $("description").textContent = api.info.description;
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, said] of Object.entries(methods)) $("operations").append(operation(path, method, said, api));
  }
}

show().catch((error) => ($("title").textContent = `openapi.json cannot be shown: ${error.message}`));
