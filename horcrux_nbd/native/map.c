/* The states of a layer's blocks: groups of 128 in a radix tree, and ranges of zeroed groups.
 *
 * One thread changes it at a time (the layer's lock); any number read beside that, without a lock:
 * a group's states are four words that are changed atomically, and neither nodes nor groups are
 * freed before the map is. A group that was dropped is kept for when it comes back.
 * blockmap.py says what the states mean; it has the rules, this has the storage.
 */
#include "core.h"

#include <stdlib.h>
#include <string.h>

#define FANOUT_BITS 6
#define FANOUT (1u << FANOUT_BITS)
#define LEVELS 8 /* 48 bits of group number: images of 128 EiB */
#define WORDS (GROUP / 32)

struct group {
  _Atomic uint64_t words[WORDS]; /* two bits for each block, the first in the low ones */
  struct group *next_dirty;
  uint64_t number;
  atomic_bool present;
  bool dirty, listed; /* one that was dropped stays in the list until that is taken */
};

struct node {
  _Atomic (void *) slots[FANOUT]; /* nodes; groups in the lowest level */
  _Atomic uint64_t count;         /* of groups below that are present: walks skip the rest */
};

struct range {
  uint64_t start, stop;
};

struct hx_map {
  struct node root;
  struct group *dirty; /* a list */
  _Atomic uint64_t dirty_count;
  pthread_rwlock_t zeros_lock;
  struct range *zeros; /* ascending, neither touching nor overlapping */
  size_t zeros_room;
  _Atomic size_t zeros_count;
};

static const uint64_t low_bits = 0x5555555555555555u;

struct hx_map *
hx_map_new (void)
{
  struct hx_map *map = calloc (1, sizeof *map);
  if (map)
    pthread_rwlock_init (&map->zeros_lock, NULL);
  return map;
}

static void
free_below (struct node *node, int level)
{
  for (unsigned i = 0; i < FANOUT; i++) {
    void *slot = atomic_load_explicit (&node->slots[i], memory_order_relaxed);
    if (slot && level)
      free_below (slot, level - 1);
    free (slot);
  }
}

void
hx_map_free (struct hx_map *map)
{
  if (!map)
    return;
  free_below (&map->root, LEVELS - 1);
  free (map->zeros);
  pthread_rwlock_destroy (&map->zeros_lock);
  free (map);
}

static unsigned
slot_of (uint64_t number, int level)
{
  return number >> (level * FANOUT_BITS) & (FANOUT - 1);
}

/* The group, whether it is present or not; NULL if it never was. */
static struct group *
find (struct hx_map *map, uint64_t number)
{
  if (number >> (LEVELS * FANOUT_BITS))
    return NULL;
  void *at = &map->root;
  for (int level = LEVELS - 1; level >= 0 && at; level--)
    at = atomic_load_explicit (&((struct node *) at)->slots[slot_of (number, level)],
                               memory_order_acquire);
  return at;
}

static struct group *
present (struct hx_map *map, uint64_t number)
{
  struct group *group = find (map, number);
  return group && atomic_load (&group->present) ? group : NULL;
}

/* The group, made where there is none, not yet present; NULL without memory. */
static struct group *
make (struct hx_map *map, uint64_t number)
{
  if (number >> (LEVELS * FANOUT_BITS))
    return NULL;
  struct node *node = &map->root;
  for (int level = LEVELS - 1;; level--) {
    _Atomic (void *) *slot = &node->slots[slot_of (number, level)];
    void *below = atomic_load_explicit (slot, memory_order_relaxed);
    if (!below) {
      below = calloc (1, level ? sizeof (struct node) : sizeof (struct group));
      if (!below)
        return NULL;
      if (!level)
        ((struct group *) below)->number = number;
      atomic_store_explicit (slot, below, memory_order_release);
    }
    if (!level)
      return below;
    node = below;
  }
}

static uint64_t
filled (unsigned state)
{
  return low_bits * state;
}

/* The state that the whole group has, or HX_MIXED. */
static int
uniform (const uint64_t words[WORDS])
{
  int state = words[0] & 3;
  for (unsigned i = 0; i < WORDS; i++)
    if (words[i] != filled (state))
      return HX_MIXED;
  return state;
}

static void
load (struct group *group, uint64_t words[WORDS])
{
  for (unsigned i = 0; i < WORDS; i++)
    words[i] = atomic_load (&group->words[i]);
}

static void
unpack (const uint64_t words[WORDS], uint8_t *states)
{
  for (unsigned i = 0; i < GROUP; i++)
    states[i] = words[i / 32] >> (i % 32 * 2) & 3;
}

int
hx_map_get (struct hx_map *map, uint64_t number, uint8_t *states)
{
  struct group *group = present (map, number);
  uint64_t words[WORDS];
  if (!group)
    return HX_ABSENT;
  load (group, words);
  int state = uniform (words);
  if (state == HX_MIXED)
    unpack (words, states);
  return state;
}

static void
soil (struct hx_map *map, struct group *group)
{
  if (group->dirty)
    return;
  group->dirty = true;
  atomic_fetch_add (&map->dirty_count, 1);
  if (!group->listed) {
    group->listed = true;
    group->next_dirty = map->dirty;
    map->dirty = group;
  }
}

/* One group more, or less, is present in each node above `number`. */
static void
tally (struct hx_map *map, uint64_t number, uint64_t change)
{
  struct node *node = &map->root;
  for (int level = LEVELS - 1; level >= 0; level--) {
    atomic_fetch_add (&node->count, change);
    node = atomic_load_explicit (&node->slots[slot_of (number, level)], memory_order_relaxed);
  }
}

static void
show (struct hx_map *map, struct group *group)
{
  if (atomic_load (&group->present))
    return;
  tally (map, group->number, 1);
  atomic_store (&group->present, true);
}

int
hx_map_put (struct hx_map *map, uint64_t number, const uint8_t *states, int dirty)
{
  struct group *group = make (map, number);
  if (!group)
    return HX_NO_MEMORY;
  for (unsigned i = 0; i < WORDS; i++) {
    uint64_t word = 0;
    for (unsigned lane = 0; lane < 32; lane++)
      word |= (uint64_t) (states[i * 32 + lane] & 3) << (lane * 2);
    atomic_store (&group->words[i], word);
  }
  show (map, group);
  if (dirty)
    soil (map, group);
  return 0;
}

/* It is not there any more, and not dirty; a zero range says what it is. */
void
hx_map_drop (struct hx_map *map, uint64_t number)
{
  struct group *group = present (map, number);
  if (!group)
    return;
  atomic_store (&group->present, false);
  tally (map, number, (uint64_t) -1);
  if (group->dirty)
    atomic_fetch_sub (&map->dirty_count, 1);
  group->dirty = false;
}

int
hx_map_touch (struct hx_map *map, uint64_t number)
{
  struct group *group = present (map, number);
  if (!group)
    return HX_ABSENT;
  soil (map, group);
  return 0;
}

/* The first present group of a subtree from `number` on. */
static struct group *
next_in (struct node *node, int level, uint64_t number)
{
  for (unsigned i = slot_of (number, level); i < FANOUT; i++) {
    void *below = atomic_load_explicit (&node->slots[i], memory_order_acquire);
    if (below && level && atomic_load (&((struct node *) below)->count)) {
      struct group *found = next_in (below, level - 1, i == slot_of (number, level) ? number : 0);
      if (found)
        return found;
    }
    else if (below && !level && atomic_load (&((struct group *) below)->present))
      return below;
  }
  return NULL;
}

static struct group *
next_present (struct hx_map *map, uint64_t number)
{
  return number >> (LEVELS * FANOUT_BITS) ? NULL : next_in (&map->root, LEVELS - 1, number);
}

uint64_t
hx_map_next (struct hx_map *map, uint64_t number)
{
  struct group *group = next_present (map, number);
  return group ? group->number : UINT64_MAX;
}

uint64_t
hx_map_count (struct hx_map *map)
{
  return atomic_load (&map->root.count);
}

uint64_t
hx_map_dirty (struct hx_map *map)
{
  return atomic_load (&map->dirty_count);
}

uint64_t
hx_map_list (struct hx_map *map, uint64_t low, uint64_t high, uint64_t *numbers, uint8_t *states,
             uint64_t room)
{
  uint64_t count = 0;
  while (count < room && low < high) {
    struct group *group = next_present (map, low);
    uint64_t words[WORDS];
    if (!group || group->number >= high)
      break;
    numbers[count] = group->number;
    if (states) {
      load (group, words);
      unpack (words, states + count * GROUP);
    }
    low = group->number + 1;
    count++;
  }
  return count;
}

uint64_t
hx_map_take (struct hx_map *map, uint64_t *numbers, uint8_t *states)
{
  uint64_t count = 0;
  while (map->dirty) {
    struct group *group = map->dirty;
    uint64_t words[WORDS];
    map->dirty = group->next_dirty;
    group->listed = false;
    if (!group->dirty)
      continue;
    group->dirty = false;
    numbers[count] = group->number;
    load (group, words);
    unpack (words, states + count * GROUP);
    count++;
  }
  atomic_store (&map->dirty_count, 0);
  return count;
}

void
hx_map_sum (struct hx_map *map, uint64_t sums[3])
{
  struct group *group;
  bool zeros = hx_zeros_count (map) != 0;
  memset (sums, 0, 3 * sizeof *sums);
  for (uint64_t number = 0; (group = next_present (map, number)); number = group->number + 1) {
    uint64_t words[WORDS];
    load (group, words);
    for (unsigned i = 0; i < WORDS; i++) {
      sums[0] += __builtin_popcountll (words[i] & low_bits);
      sums[1] += __builtin_popcountll (words[i] >> 1 & low_bits);
    }
    if (zeros)
      sums[2] += hx_zeros_has (map, group->number);
  }
}

/* ---- ranges of groups that are zeroed as a whole; a group that is there wins over them */

/* How many ranges stop before `value`. */
static size_t
before (const struct hx_map *map, uint64_t value)
{
  size_t low = 0, high = atomic_load_explicit (&map->zeros_count, memory_order_relaxed);
  while (low < high) {
    size_t middle = low + (high - low) / 2;
    if (map->zeros[middle].stop < value)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

int
hx_zeros_add (struct hx_map *map, uint64_t start, uint64_t stop)
{
  int result = 0;
  pthread_rwlock_wrlock (&map->zeros_lock);
  size_t count = atomic_load (&map->zeros_count);
  if (count == map->zeros_room) {
    size_t room = count ? 2 * count : 16;
    struct range *more = realloc (map->zeros, room * sizeof *more);
    if (!more) {
      result = HX_NO_MEMORY;
      goto out;
    }
    map->zeros = more;
    map->zeros_room = room;
  }
  size_t first = before (map, start), last = first; /* those that touch or overlap it */
  while (last < count && map->zeros[last].start <= stop)
    last++;
  if (first < last) {
    if (map->zeros[first].start < start)
      start = map->zeros[first].start;
    if (map->zeros[last - 1].stop > stop)
      stop = map->zeros[last - 1].stop;
  }
  memmove (&map->zeros[first + 1], &map->zeros[last], (count - last) * sizeof *map->zeros);
  map->zeros[first] = (struct range) { start, stop };
  atomic_store (&map->zeros_count, count - (last - first) + 1);
out:
  pthread_rwlock_unlock (&map->zeros_lock);
  return result;
}

uint64_t
hx_zeros_count (struct hx_map *map)
{
  return atomic_load (&map->zeros_count);
}

/* Whether `number` is in a range; in *change where that changes next. */
static bool
in_zeros (struct hx_map *map, uint64_t number, uint64_t *change)
{
  bool inside = false;
  *change = UINT64_MAX;
  if (!atomic_load (&map->zeros_count) || number == UINT64_MAX) /* what is before group 0 */
    return false;
  pthread_rwlock_rdlock (&map->zeros_lock);
  size_t at = before (map, number + 1);
  if (at < atomic_load (&map->zeros_count)) {
    inside = map->zeros[at].start <= number;
    *change = inside ? map->zeros[at].stop : map->zeros[at].start;
  }
  pthread_rwlock_unlock (&map->zeros_lock);
  return inside;
}

int
hx_zeros_has (struct hx_map *map, uint64_t number)
{
  uint64_t change;
  return in_zeros (map, number, &change);
}

uint64_t
hx_zeros_change (struct hx_map *map, uint64_t number)
{
  uint64_t change;
  in_zeros (map, number, &change);
  return change;
}

void
hx_zeros_list (struct hx_map *map, uint64_t *starts, uint64_t *stops)
{
  pthread_rwlock_rdlock (&map->zeros_lock);
  size_t count = atomic_load (&map->zeros_count);
  for (size_t i = 0; i < count; i++) {
    starts[i] = map->zeros[i].start;
    stops[i] = map->zeros[i].stop;
  }
  pthread_rwlock_unlock (&map->zeros_lock);
}

/* ---- for requests that are served here */

int
map_run (struct hx_map *map, uint64_t block, uint64_t limit, uint64_t *stop)
{
  uint64_t number = block >> GROUP_BITS, end = (number + 1) << GROUP_BITS;
  struct group *group = present (map, number);
  if (end > limit)
    end = limit;
  if (!group) {
    *stop = end;
    return hx_zeros_has (map, number) ? HX_ZERO : HX_BASE;
  }
  unsigned at = block & (GROUP - 1), last = at + (unsigned) (end - block);
  unsigned state = atomic_load (&group->words[at / 32]) >> (at % 32 * 2) & 3;
  while (at < last) {
    /* Two bits that are not 0 where a block differs, from this block on. */
    uint64_t differs = (atomic_load (&group->words[at / 32]) ^ filled (state)) >> (at % 32 * 2);
    if (differs) {
      at += (unsigned) __builtin_ctzll (differs) / 2;
      break;
    }
    at = (at / 32 + 1) * 32;
  }
  if (at > last)
    at = last;
  *stop = (number << GROUP_BITS) + at;
  return (int) state;
}

int
map_mark_data (struct hx_map *map, uint64_t first, uint64_t stop)
{
  /* Memory first, so that all blocks are marked or none. */
  for (uint64_t number = first >> GROUP_BITS; number << GROUP_BITS < stop; number++)
    if (!make (map, number))
      return HX_NO_MEMORY;
  while (first < stop) {
    uint64_t number = first >> GROUP_BITS, end = (number + 1) << GROUP_BITS;
    struct group *group = find (map, number);
    uint64_t words[WORDS];
    if (end > stop)
      end = stop;
    if (atomic_load (&group->present))
      load (group, words);
    else
      for (unsigned i = 0; i < WORDS; i++)
        words[i] = filled (hx_zeros_has (map, number) ? HX_ZERO : HX_BASE);
    for (; first < end; first++) {
      unsigned at = first & (GROUP - 1);
      words[at / 32] &= ~((uint64_t) 3 << (at % 32 * 2));
      words[at / 32] |= (uint64_t) HX_DATA << (at % 32 * 2);
    }
    for (unsigned i = 0; i < WORDS; i++)
      atomic_store (&group->words[i], words[i]);
    show (map, group);
    soil (map, group);
  }
  return 0;
}
