/* The native part of a served volume: what is local is read and written here, without Python.
 *
 * Python makes these objects and keeps every invariant of docs/design.md with the same calls that
 * are used here (native/handles.py has the other end). Nothing here fetches, syncs, commits or
 * decides: what is not plainly local is left to Python.
 *
 * Locks, from the outside in; whoever has one takes only those below it:
 *   gate       shared by writers, held alone by a commit (Overlay.paused)
 *   stack      shared by every request that is served here, held alone to replace the stack
 *   stripes    of groups of blocks; taken in ascending order
 *   flushing   one flush at a time, native or Python's; it waits for the disk
 *   layer      marks: `recent`, states, dirty groups; Python's Layer._lock
 *   zeros, set leaves; nothing is taken inside them
 * A thread that holds one of them never waits for Python's interpreter lock, except Python's own.
 */
#ifndef HORCRUX_CORE_H
#define HORCRUX_CORE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define HX_API __attribute__ ((visibility ("default")))
#define HX_ABI 1 /* native/library.py has the same number */

#define BLOCK_BITS 12
#define BLOCK_SIZE (1u << BLOCK_BITS)
#define GROUP_BITS 7
#define GROUP (1u << GROUP_BITS) /* blocks */
#define STRIPES 64 /* overlay.py has the same number */

enum { HX_BASE = 0, HX_DATA = 1, HX_ZERO = 2, HX_MIXED = 3 };
#define HX_ABSENT -1
#define HX_NO_MEMORY -2

/* ---- map.c: the states of a layer's blocks */

struct hx_map;
HX_API struct hx_map *hx_map_new (void);
HX_API void hx_map_free (struct hx_map *map);
/* HX_ABSENT, a state that all 128 blocks have, or HX_MIXED and `states` filled, a byte each. */
HX_API int hx_map_get (struct hx_map *map, uint64_t number, uint8_t *states);
/* The rest is called under the layer's lock, where it changes something. */
HX_API int hx_map_put (struct hx_map *map, uint64_t number, const uint8_t *states, int dirty);
HX_API void hx_map_drop (struct hx_map *map, uint64_t number);
HX_API int hx_map_touch (struct hx_map *map, uint64_t number);
/* The first group that is there, from `number` on; UINT64_MAX if none is. */
HX_API uint64_t hx_map_next (struct hx_map *map, uint64_t number);
HX_API uint64_t hx_map_count (struct hx_map *map);
HX_API uint64_t hx_map_dirty (struct hx_map *map);
/* Numbers of groups that are there, in [low, high), ascending, at most `room`; how many. */
HX_API uint64_t hx_map_list (struct hx_map *map, uint64_t low, uint64_t high, uint64_t *numbers,
                             uint8_t *states, uint64_t room);
/* Take all dirty groups (in no order); `numbers` and `states` have room for hx_map_dirty. */
HX_API uint64_t hx_map_take (struct hx_map *map, uint64_t *numbers, uint8_t *states);
/* Blocks that are DATA and ZERO in groups, and groups inside of zero ranges. */
HX_API void hx_map_sum (struct hx_map *map, uint64_t sums[3]);

HX_API int hx_zeros_add (struct hx_map *map, uint64_t start, uint64_t stop);
HX_API uint64_t hx_zeros_count (struct hx_map *map);
HX_API int hx_zeros_has (struct hx_map *map, uint64_t number);
/* Where membership changes next, above `number`; UINT64_MAX if nowhere. */
HX_API uint64_t hx_zeros_change (struct hx_map *map, uint64_t number);
HX_API void hx_zeros_list (struct hx_map *map, uint64_t *starts, uint64_t *stops);

/* The state of `block`, and in *stop where its run ends, at most at `limit` (blocks). */
int map_run (struct hx_map *map, uint64_t block, uint64_t limit, uint64_t *stop);
/* Give whole blocks the state DATA, in memory. 0, or HX_NO_MEMORY with nothing changed. */
int map_mark_data (struct hx_map *map, uint64_t first, uint64_t stop);

/* ---- layer.c, flush.c: one layer of the overlay */

#define HX_MOST_WRITTEN 16 /* core.py has the same number */

struct hx_layer {
  struct hx_map *map;
  pthread_mutex_t lock;
  uint64_t segment_size, segments;
  _Atomic int *fds;        /* of the data files, -1 where there is none */
  _Atomic uint8_t *dirty;  /* data files that were written to since they were taken */
  pthread_mutex_t writing; /* of `written` alone */
  struct hx_range { uint64_t first, stop; } written[HX_MOST_WRITTEN];
  unsigned written_count;
  _Atomic int written_many; /* more than fit were written since they were taken */
  _Atomic int closed;      /* nothing may be written natively: a sync failed, or it is frozen */
  pthread_mutex_t flushing;
  _Atomic uint64_t asked;
  uint64_t done;           /* of the flushes that were asked for */
  _Atomic int whole;       /* the next flush is of everything: left to Python */
  _Atomic int failed;      /* the errno of a sync here that failed */
  _Atomic uint64_t journal[4];
  uint64_t seed;           /* of its checksums */
  struct record *record;   /* memory for one */
  int recent_fd;           /* -1: nothing is noted */
  uint64_t recent_at, recent_end;
  uint32_t generation;
};

HX_API struct hx_layer *hx_layer_new (uint64_t size, uint64_t segment_size, uint64_t seed);
HX_API void hx_layer_free (struct hx_layer *layer);
HX_API struct hx_map *hx_layer_map (struct hx_layer *layer);
HX_API void hx_layer_lock (struct hx_layer *layer);
HX_API void hx_layer_unlock (struct hx_layer *layer);
HX_API int hx_layer_set_file (struct hx_layer *layer, uint64_t segment, int fd);
HX_API void hx_layer_set_closed (struct hx_layer *layer, int closed);
HX_API int hx_layer_touch (struct hx_layer *layer, uint64_t segment);
/* Blocks of data files were written to; what was since they were taken, -1 if they are many. */
HX_API void hx_layer_wrote (struct hx_layer *layer, uint64_t first, uint64_t stop);
HX_API int hx_layer_take_written (struct hx_layer *layer, uint64_t *firsts, uint64_t *stops);
HX_API uint64_t hx_layer_take (struct hx_layer *layer, uint64_t *segments, uint64_t room);
/* Marks are noted in `fd` from `at` on, to `end` at most. Under the layer's lock, as hx_note is. */
HX_API void hx_recent_set (struct hx_layer *layer, int fd, uint64_t at, uint64_t end,
                           uint32_t generation);
HX_API uint64_t hx_recent_at (struct hx_layer *layer);
/* 1, 0 if there is no room, -errno. */
HX_API int hx_note (struct hx_layer *layer, uint64_t first, uint64_t what);

/* The state of the journal (journal.py), under `flushing`. */
enum { HX_JOURNAL_FD = 0, HX_JOURNAL_AT = 1, HX_JOURNAL_NUMBER = 2, HX_JOURNAL_EPOCH = 3 };
#define HX_JOURNAL_SIZE (2u << 20) /* journal.py has the same number */
HX_API uint64_t hx_journal_get (struct hx_layer *layer, unsigned what);
HX_API void hx_journal_set (struct hx_layer *layer, unsigned what, uint64_t value);
HX_API void hx_layer_set_whole (struct hx_layer *layer, int whole);
HX_API int hx_layer_failed (struct hx_layer *layer);
HX_API void hx_flush_lock (struct hx_layer *layer);
HX_API void hx_flush_unlock (struct hx_layer *layer);
bool layer_flush (struct hx_layer *layer);

/* ---- table.c: chunks of the base that are open and verified */

struct hx_file {
  _Atomic uint32_t users; /* reads under way, and GONE */
  _Atomic uint32_t refs;
  _Atomic uint8_t used;
  int fd;
  uint64_t length;
};

/* Takes the descriptor over; the caller has one reference. */
HX_API struct hx_file *hx_file_new (int fd, uint64_t length);
/* No read begins any more; it is closed with the last one. Gives the caller's reference back. */
HX_API void hx_file_retire (struct hx_file *file);
HX_API int hx_file_used (struct hx_file *file, int reset);

struct hx_table;
HX_API struct hx_table *hx_table_new (uint64_t chunk_size, uint64_t slots);
HX_API void hx_table_free (struct hx_table *table);
/* `file` NULL: the chunk is zeros. */
HX_API void hx_table_put (struct hx_table *table, uint64_t number, struct hx_file *file);
/* Fill `buf` from the image's byte `offset`; the request lies in one chunk. HX_DATA if it came from a
 * file, HX_ZERO, or HX_ABSENT. */
int table_read (struct hx_table *table, void *buf, size_t count, uint64_t offset);
uint64_t table_chunk_size (const struct hx_table *table);

/* ---- volume.c: layers over a base */

struct hx_volume;
HX_API struct hx_volume *hx_volume_new (void);
HX_API void hx_volume_free (struct hx_volume *volume);
/* Layers from the newest, which is written unless `read_only`, to the oldest. */
HX_API int hx_volume_set (struct hx_volume *volume, struct hx_layer **layers, size_t count,
                          struct hx_table *base, int read_only);
HX_API void hx_gate_enter (struct hx_volume *volume);
HX_API void hx_gate_leave (struct hx_volume *volume);
HX_API void hx_gate_close (struct hx_volume *volume);
HX_API void hx_gate_open (struct hx_volume *volume);
/* `which` has a bit for each stripe. */
HX_API void hx_stripes_lock (struct hx_volume *volume, uint64_t which);
HX_API void hx_stripes_unlock (struct hx_volume *volume, uint64_t which);
/* Read from the start of the request what is here; bytes done, the rest is left to Python. */
HX_API size_t hx_read (struct hx_volume *volume, void *buf, size_t count, uint64_t offset);
/* 1 if it is written, 0 if that is left to Python. */
HX_API int hx_write (struct hx_volume *volume, const void *buf, size_t count, uint64_t offset);
/* fdatasync; tests have a disk of their own. */
extern HX_API int (*hx_sync) (int fd);
/* 1 if all that was acknowledged before is durable, 0 if that is left to Python. */
HX_API int hx_flush (struct hx_volume *volume);
/* How many native flushes took how long, as figures.py counts them; the sum in nanoseconds. */
#define BOUNDS 15
HX_API uint64_t hx_volume_flushes (struct hx_volume *volume, uint64_t counts[BOUNDS + 1]);
/* Reads, bytes read, writes, bytes written here; pieces of reads that the cache had. */
#define SUMS 5
HX_API void hx_volume_sums (struct hx_volume *volume, uint64_t sums[SUMS]);

bool read_all (int fd, void *buf, size_t count, uint64_t offset);
bool write_all (int fd, const void *buf, size_t count, uint64_t offset);

#endif
