// Dragging with mouse, pen or finger, by pointer events: [data-chip] is dragged onto [data-drop].

const FAR = 6; // pixels after which a press is a drag

/** Calls dropped(chip's number, drop's name) at the end of a drag. */
export function dragging(dropped) {
  let from, ghost, over;
  let dragged = false; // the click that follows is the drag's end

  function target(event) {
    return document.elementFromPoint(event.clientX, event.clientY)?.closest("[data-drop]");
  }
  function begin(chip) {
    ghost = chip.cloneNode(true);
    ghost.removeAttribute("id");
    ghost.classList.add("ghost");
    document.body.append(ghost);
    document.body.classList.add("dragging");
  }
  function end() {
    ghost?.remove();
    over?.classList.remove("over");
    document.body.classList.remove("dragging");
    from = ghost = over = undefined;
  }
  addEventListener("pointerdown", event => {
    const chip = event.target.closest("[data-chip]");
    dragged = false;
    if (!chip || event.button !== 0) return;
    from = { chip, output: Number(chip.dataset.chip), x: event.clientX, y: event.clientY };
    if (chip.hasPointerCapture(event.pointerId)) chip.releasePointerCapture(event.pointerId);
  });
  addEventListener("pointermove", event => {
    if (!from) return;
    if (!ghost && Math.hypot(event.clientX - from.x, event.clientY - from.y) < FAR) return;
    if (!ghost) begin(from.chip);
    event.preventDefault();
    ghost.style.translate = `${event.clientX}px ${event.clientY}px`;
    const now = target(event);
    if (now !== over) {
      over?.classList.remove("over");
      now?.classList.add("over");
      over = now;
    }
  });
  addEventListener("pointerup", event => {
    const drop = ghost && target(event);
    const { output } = from ?? {};
    dragged = Boolean(ghost);
    end();
    if (drop) dropped(output, drop.dataset.drop);
  });
  addEventListener("click", event => {
    if (dragged) event.stopPropagation();
    dragged = false;
  }, { capture: true });
  addEventListener("pointercancel", end);
  addEventListener("keydown", event => { if (event.key === "Escape") end(); });
}
