/* Chunks of the base that are open and verified: a bounded table from chunk number to file.
 *
 * It never grows with the image: sets of a few slots, of which the one that was not used longest makes
 * room. What is not in it is left to Python, which puts it in again.
 *
 * A file may be retired (evicted, damaged) at any time, under reads. It is closed when the last of
 * them is done, and its memory goes with the last reference; a slot that still has it is empty.
 */
#include "core.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define WAYS 8
#define GONE 0x80000000u

struct slot {
  uint64_t number;
  struct hx_file *file; /* NULL for a chunk of zeros */
  uint64_t used; /* when, in uses of its set; 0: the slot is free */
};

struct set {
  pthread_mutex_t lock; /* zero bytes are an unlocked one: untouched sets take no memory */
  uint64_t uses;
  struct slot slots[WAYS];
};

struct hx_table {
  uint64_t chunk_size, mask;
  struct set *sets;
};

/* ---- files */

struct hx_file *
hx_file_new (int fd, uint64_t length)
{
  struct hx_file *file = calloc (1, sizeof *file);
  if (!file)
    return NULL;
  file->fd = fd;
  file->length = length;
  atomic_init (&file->refs, 1);
  return file;
}

static void
drop (struct hx_file *file)
{
  if (file && atomic_fetch_sub (&file->refs, 1) == 1)
    free (file);
}

/* The caller has a reference, or the lock of a slot that has one. */
static bool
acquire (struct hx_file *file)
{
  uint32_t users = atomic_load (&file->users);
  do
    if (users & GONE)
      return false;
  while (!atomic_compare_exchange_weak (&file->users, &users, users + 1));
  atomic_fetch_add (&file->refs, 1);
  return true;
}

static void
release (struct hx_file *file)
{
  if (atomic_fetch_sub (&file->users, 1) == (GONE | 1))
    close (file->fd);
  drop (file);
}

void
hx_file_retire (struct hx_file *file)
{
  if (atomic_fetch_or (&file->users, GONE) == 0)
    close (file->fd);
  drop (file);
}

int
hx_file_used (struct hx_file *file, int reset)
{
  return reset ? atomic_exchange (&file->used, 0) : atomic_load (&file->used);
}

/* ---- the table */

struct hx_table *
hx_table_new (uint64_t chunk_size, uint64_t slots)
{
  struct hx_table *table = calloc (1, sizeof *table);
  uint64_t sets = 1;
  if (!table)
    return NULL;
  while (sets * WAYS < slots)
    sets *= 2;
  table->chunk_size = chunk_size;
  table->mask = sets - 1;
  table->sets = calloc (sets, sizeof *table->sets);
  if (!table->sets) {
    free (table);
    return NULL;
  }
  return table;
}

void
hx_table_free (struct hx_table *table)
{
  if (!table)
    return;
  for (uint64_t i = 0; i <= table->mask; i++)
    for (unsigned way = 0; way < WAYS; way++)
      drop (table->sets[i].slots[way].file);
  free (table->sets);
  free (table);
}

uint64_t
table_chunk_size (const struct hx_table *table)
{
  return table->chunk_size;
}

static struct set *
set_of (struct hx_table *table, uint64_t number)
{
  /* Fibonacci hashing: numbers that have a power of two in common spread, too. */
  return &table->sets[(number * 0x9E3779B97F4A7C15u) >> 32 & table->mask];
}

static bool
is_gone (const struct slot *slot)
{
  return slot->file && atomic_load (&slot->file->users) & GONE;
}

static struct slot *
slot_for (struct set *set, uint64_t number)
{
  struct slot *best = &set->slots[0];
  uint64_t oldest = UINT64_MAX;
  for (unsigned way = 0; way < WAYS; way++) {
    struct slot *slot = &set->slots[way];
    uint64_t used = is_gone (slot) ? 0 : slot->used;
    if (slot->used && slot->number == number)
      return slot;
    if (used < oldest) {
      oldest = used;
      best = slot;
    }
  }
  return best;
}

void
hx_table_put (struct hx_table *table, uint64_t number, struct hx_file *file)
{
  struct set *set = set_of (table, number);
  struct hx_file *old;
  if (file)
    atomic_fetch_add (&file->refs, 1);
  pthread_mutex_lock (&set->lock);
  struct slot *slot = slot_for (set, number);
  old = slot->file;
  *slot = (struct slot) { number, file, ++set->uses };
  pthread_mutex_unlock (&set->lock);
  drop (old);
}

int
table_read (struct hx_table *table, void *buf, size_t count, uint64_t offset)
{
  uint64_t number = offset / table->chunk_size, at = offset % table->chunk_size;
  struct set *set = set_of (table, number);
  struct hx_file *file = NULL;
  bool found = false;
  pthread_mutex_lock (&set->lock);
  for (unsigned way = 0; way < WAYS && !found; way++) {
    struct slot *slot = &set->slots[way];
    if (!slot->used || slot->number != number)
      continue;
    file = slot->file;
    if (file && (at + count > file->length || !acquire (file)))
      break;
    slot->used = ++set->uses;
    found = true;
  }
  pthread_mutex_unlock (&set->lock);
  if (!found)
    return HX_ABSENT;
  if (!file) {
    memset (buf, 0, count);
    return HX_ZERO;
  }
  if (!atomic_load_explicit (&file->used, memory_order_relaxed))
    atomic_store (&file->used, 1);
  found = read_all (file->fd, buf, count, at);
  release (file);
  return found ? HX_DATA : HX_ABSENT;
}
