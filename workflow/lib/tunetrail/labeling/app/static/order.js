// Ordered groups with ties as pure functions: {groups: [[output, …], …] best first, unplaced: [output, …]}.

const without = (order, output) => ({
  groups: order.groups.map(group => group.filter(other => other !== output)).filter(group => group.length),
  unplaced: order.unplaced.filter(other => other !== output),
});
const groupOf = (order, output) => order.groups.findIndex(group => group.includes(output));
const sorted = group => [...group].sort((a, b) => a - b);

/** Into a group of its own before the group that is n-th now. */
export function insert(order, output, n) {
  const from = groupOf(order, output);
  const alone = from >= 0 && order.groups[from].length === 1;
  const rest = without(order, output);
  rest.groups.splice(alone && from < n ? n - 1 : n, 0, [output]);
  return rest;
}

/** Into the n-th group, tied with those there. */
export function join(order, output, n) {
  const with_ = order.groups[n].find(other => other !== output);
  if (with_ === undefined) return order;
  const rest = without(order, output);
  const at = groupOf(rest, with_);
  rest.groups[at] = sorted([...rest.groups[at], output]);
  return rest;
}

export const place = (order, output) => insert(order, output, order.groups.length);

export function remove(order, output) {
  const rest = without(order, output);
  return { ...rest, unplaced: sorted([...rest.unplaced, output]) };
}

/** Half a step: out of a tie, or into one with the next group. `by` is -1 for better, 1 for worse. */
export function move(order, output, by) {
  const n = groupOf(order, output);
  if (n < 0) return place(order, output);
  if (order.groups[n].length > 1) return insert(order, output, by < 0 ? n : n + 1);
  return n + by < 0 || n + by >= order.groups.length ? order : join(order, output, n + by);
}

/** Tied with the group above; the first with the group below. */
export function tie(order, output) {
  const n = groupOf(order, output);
  if (n < 0) return order.groups.length ? join(order, output, order.groups.length - 1) : place(order, output);
  const other = n > 0 ? n - 1 : 1;
  return other < order.groups.length ? join(order, output, other) : order;
}

export const tieRest = order => order.unplaced.length
  ? { groups: [...order.groups, order.unplaced], unplaced: [] }
  : order;

/** Rank of each of k outputs from 1, equal for ties; null where it is not placed. */
export function ranks(order, k) {
  return Array.from({ length: k }, (_, output) => groupOf(order, output) + 1 || null);
}

export function fromRanks(values) {
  const given = [...new Set(values.filter(Boolean))].sort((a, b) => a - b);
  const at = rank => values.flatMap((value, output) => (value === rank ? [output] : []));
  return { groups: given.map(at), unplaced: values.flatMap((value, output) => (value ? [] : [output])) };
}
