/* Flushes that need no word in the map: of data files alone, or of a few blocks into the journal.
 *
 * journal.py and layer.py have the rules and do the same; a flush of theirs and one of these never
 * run at once (`flushing`). What is not plainly one of the two is left to Python, which finds
 * everything as it was, or `failed` set.
 */
#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct record {
  char magic[4];
  uint32_t count;
  uint64_t epoch, number, checksum, blocks[];
};

_Static_assert (sizeof (struct record) == 32, "journal.py, RECORD");

/* ---- XXH64, of whole stripes of 32 bytes */

#define P1 0x9E3779B185EBCA87u
#define P2 0xC2B2AE3D27D4EB4Fu
#define P3 0x165667B19E3779F9u
#define P4 0x85EBCA77C2B2AE63u

static uint64_t
rotated (uint64_t value, int by)
{
  return value << by | value >> (64 - by);
}

static uint64_t
xxh64 (const char *data, size_t length, uint64_t seed)
{
  uint64_t lanes[4] = { seed + P1 + P2, seed + P2, seed, seed - P1 }, hash;
  for (size_t at = 0; at < length; at += sizeof lanes) {
    uint64_t words[4];
    memcpy (words, data + at, sizeof words);
    for (int i = 0; i < 4; i++)
      lanes[i] = rotated (lanes[i] + words[i] * P2, 31) * P1;
  }
  hash = rotated (lanes[0], 1) + rotated (lanes[1], 7) + rotated (lanes[2], 12)
         + rotated (lanes[3], 18);
  for (int i = 0; i < 4; i++)
    hash = (hash ^ rotated (lanes[i] * P2, 31) * P1) * P1 + P4;
  hash += length;
  hash = (hash ^ hash >> 33) * P2;
  hash = (hash ^ hash >> 29) * P3;
  return hash ^ hash >> 32;
}

/* ---- what is flushed */

int (*hx_sync) (int fd) = fdatasync;

/* The disk lost something: nothing is acknowledged any more, and Python says so. */
static bool
fail (struct hx_layer *layer)
{
  atomic_store (&layer->failed, errno ? errno : EIO);
  atomic_store (&layer->closed, 1);
  return false;
}

static bool
sync_files (struct hx_layer *layer)
{
  uint64_t segment;
  while (hx_layer_take (layer, &segment, 1))
    if (hx_sync (atomic_load (&layer->fds[segment])))
      return fail (layer);
  return true;
}

/* Add a block to ascending ones; false if there are too many. */
static bool
add_block (uint64_t *blocks, unsigned *count, uint64_t block)
{
  unsigned at = *count;
  while (at && blocks[at - 1] > block)
    at--;
  if (at && blocks[at - 1] == block)
    return true;
  if (*count == HX_MOST_WRITTEN)
    return false;
  memmove (&blocks[at + 1], &blocks[at], (*count - at) * sizeof *blocks);
  blocks[at] = block;
  (*count)++;
  return true;
}

static bool
fill (struct hx_layer *layer, struct record *record, char *content)
{
  for (unsigned i = 0; i < record->count; i++) {
    uint64_t offset = record->blocks[i] << BLOCK_BITS;
    int fd = atomic_load (&layer->fds[offset / layer->segment_size]);
    size_t got = 0;
    while (got < BLOCK_SIZE) { /* behind the end of the file are zeros */
      ssize_t more = pread (fd, content + i * BLOCK_SIZE + got, BLOCK_SIZE - got,
                            (off_t) (offset % layer->segment_size + got));
      if (more < 0)
        return false;
      if (more == 0)
        break;
      got += (size_t) more;
    }
    memset (content + i * BLOCK_SIZE + got, 0, BLOCK_SIZE - got);
  }
  return true;
}

static bool
append (struct hx_layer *layer)
{
  uint64_t firsts[HX_MOST_WRITTEN], stops[HX_MOST_WRITTEN], blocks[HX_MOST_WRITTEN];
  unsigned count = 0;
  bool small = true;
  int fd = (int) layer->journal[HX_JOURNAL_FD], ranges;
  uint64_t at = layer->journal[HX_JOURNAL_AT];
  ranges = hx_layer_take_written (layer, firsts, stops);
  for (int i = 0; i < ranges && small; i++)
    for (uint64_t block = firsts[i]; block < stops[i] && small; block++)
      small = add_block (blocks, &count, block);
  if (!layer->record)
    layer->record = aligned_alloc (BLOCK_SIZE, (1 + HX_MOST_WRITTEN) * BLOCK_SIZE);
  size_t length = (1 + (size_t) count) * BLOCK_SIZE;
  struct record *record = layer->record;
  if (ranges < 0 || !small || !record || at + length > HX_JOURNAL_SIZE)
    goto many;
  if (!count)
    return layer->journal[HX_JOURNAL_NUMBER] != 0; /* all that was written was flushed */
  memset (record, 0, BLOCK_SIZE);
  memcpy (record->magic, "JREC", 4);
  record->count = count;
  record->epoch = layer->journal[HX_JOURNAL_EPOCH];
  record->number = layer->journal[HX_JOURNAL_NUMBER];
  memcpy (record->blocks, blocks, count * sizeof *blocks);
  if (!fill (layer, record, (char *) record + BLOCK_SIZE))
    goto many;
  record->checksum = xxh64 ((char *) record, length, layer->seed);
  if (!write_all (fd, record, length, at) || hx_sync (fd))
    return fail (layer);
  layer->journal[HX_JOURNAL_AT] += length;
  layer->journal[HX_JOURNAL_NUMBER]++;
  return true;
many: /* what was taken is no longer known, so the next flush is of everything */
  atomic_store (&layer->written_many, 1);
  return false;
}

static bool
flush_layer (struct hx_layer *layer)
{
  uint64_t firsts[HX_MOST_WRITTEN], stops[HX_MOST_WRITTEN];
  bool whole, plain;
  pthread_mutex_lock (&layer->lock);
  whole = atomic_load (&layer->closed) || atomic_load (&layer->whole) || layer->recent_fd < 0;
  plain = !whole && !hx_map_dirty (layer->map) && !layer->journal[HX_JOURNAL_NUMBER];
  if (plain) /* none of it has a mark that is not in the map; all of it is in the files now */
    hx_layer_take_written (layer, firsts, stops);
  pthread_mutex_unlock (&layer->lock);
  errno = 0;
  if (whole)
    return false;
  if (plain)
    return sync_files (layer);
  return (int) layer->journal[HX_JOURNAL_FD] >= 0 && append (layer);
}

bool
layer_flush (struct hx_layer *layer)
{
  /* Whoever waits here is covered by a flush that begins after it asked. */
  uint64_t mine = atomic_fetch_add (&layer->asked, 1) + 1, target;
  bool done = true;
  pthread_mutex_lock (&layer->flushing);
  if (layer->done < mine) {
    target = atomic_load (&layer->asked);
    done = flush_layer (layer);
    if (done)
      layer->done = target;
  }
  pthread_mutex_unlock (&layer->flushing);
  return done;
}

void
hx_flush_lock (struct hx_layer *layer)
{
  pthread_mutex_lock (&layer->flushing);
}

void
hx_flush_unlock (struct hx_layer *layer)
{
  pthread_mutex_unlock (&layer->flushing);
}

uint64_t
hx_journal_get (struct hx_layer *layer, unsigned what)
{
  return layer->journal[what];
}

void
hx_journal_set (struct hx_layer *layer, unsigned what, uint64_t value)
{
  layer->journal[what] = value;
}

void
hx_layer_set_whole (struct hx_layer *layer, int whole)
{
  atomic_store (&layer->whole, whole);
}

int
hx_layer_failed (struct hx_layer *layer)
{
  return atomic_load (&layer->failed);
}
