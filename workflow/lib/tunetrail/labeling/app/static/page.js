// What all pages share: talking to the server, telling the labeler, buttons that post.

const { base, csrf } = document.body.dataset;

export const say = text => { document.getElementById("status").textContent = text; };
export const warn = text => { document.getElementById("alert").textContent = text; };

/** Sends JSON. Resolves to the reply; throws an Error whose message is for the labeler, with `status` (0: no answer). */
export async function post(path, body = {}) {
  let reply;
  try {
    reply = await fetch(`${base}/${path}`, {
      method: "POST",
      headers: { "content-type": "application/json", "x-csrf-token": csrf },
      body: JSON.stringify(body),
      signal: AbortSignal.timeout(20000),
    });
  } catch {
    throw Object.assign(new Error("the server does not answer"), { status: 0 });
  }
  const said = await reply.json().catch(() => ({ error: `the server answered ${reply.status}` }));
  if (!reply.ok) throw Object.assign(new Error(said.error), { status: reply.status });
  return said;
}

/** Posts and goes where the reply says. */
export async function go(path, body) {
  try {
    location.assign((await post(path, body)).next);
  } catch (error) {
    warn(`That did not work: ${error.message}.`);
  }
}

for (const button of document.querySelectorAll("[data-post]")) {
  const event = button.dataset.event;
  button.addEventListener("click", () => go(button.dataset.post, event ? { event: Number(event) } : {}));
}

/** Whether a key belongs to what has the focus, not to the page. */
export const typing = target => target.matches("input:not([type=radio]):not([type=checkbox]), textarea, select");
