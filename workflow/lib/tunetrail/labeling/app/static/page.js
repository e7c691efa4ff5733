// What all pages share: requests, messages to the labeler, buttons that post.

const { base, csrf } = document.body.dataset;

export const say = text => { document.getElementById("status").textContent = text; };
export const warn = text => { document.getElementById("alert").textContent = text; };

/** Sends JSON and resolves to the reply. Throws an Error with a message for the labeler and `status` (0: no answer). */
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
  const answer = await reply.json().catch(() => ({ error: `the server answered ${reply.status}` }));
  if (!reply.ok) throw Object.assign(new Error(answer.error), { status: reply.status });
  return answer;
}

/** Posts, and opens the page that the reply names. */
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

/** Whether the focused element takes keys itself. */
export const typing = target => target.matches("input:not([type=radio]):not([type=checkbox]), textarea, select");
