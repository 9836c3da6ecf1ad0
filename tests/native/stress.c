/* Many threads in the native part at once, for the sanitizers of the compiler; and a check that a
 * block is never anything that was not written to it. tests/native/test_stress.py builds it.
 *
 * Each block of 4 KiB holds one number all over: a torn one shows. A number says its block in the
 * high half, so one that went astray shows as well.
 */
#include "core.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BLOCKS 4096
#define CHUNK (64u << 10)
#define WRITERS 3
#define FLUSHERS 2
#define READERS 2

static struct hx_volume *volume;
static struct hx_layer *layers[64];
static struct hx_table *table;
static atomic_bool stop;
static _Atomic uint64_t wrong, reads, writes, flushes, left;
static unsigned turns = 300;

static void
die (const char *what)
{
  perror (what);
  exit (2);
}

static int
temporary (size_t size, bool filled)
{
  char name[] = "/tmp/horcrux-stress-XXXXXX";
  int fd = mkstemp (name);
  if (fd < 0 || unlink (name) || ftruncate (fd, (off_t) size))
    die ("a temporary file");
  if (filled) {
    char *content = calloc (1, size);
    if (!content || !write_all (fd, content, size, 0))
      die ("write");
    free (content);
  }
  return fd;
}

static void
fill (uint64_t *buf, uint64_t block, uint64_t version)
{
  for (unsigned i = 0; i < BLOCK_SIZE / 8; i++)
    buf[i] = block << 32 | version;
}

static void
check (const uint64_t *buf, uint64_t block, bool alone)
{
  bool good = true;
  for (unsigned i = 0; i < BLOCK_SIZE / 8; i++)
    good = good && (buf[i] == 0 || buf[i] >> 32 == block) && (!alone || buf[i] == buf[0]);
  if (!good)
    atomic_fetch_add (&wrong, 1);
}

/* Each writer has its own blocks, so it knows what they hold. */
static void *
writer (void *number)
{
  unsigned me = (unsigned) (uintptr_t) number, seed = me;
  uint64_t buf[BLOCK_SIZE / 8], back[BLOCK_SIZE / 8];
  for (uint64_t version = 1; !atomic_load (&stop); version++) {
    uint64_t block = (unsigned) rand_r (&seed) % (BLOCKS / WRITERS) * WRITERS + me;
    fill (buf, block, version & 0xFFFFFFFF);
    if (!hx_write (volume, buf, BLOCK_SIZE, block << BLOCK_BITS)) {
      atomic_fetch_add (&left, 1);
      continue;
    }
    atomic_fetch_add (&writes, 1);
    if (hx_read (volume, back, BLOCK_SIZE, block << BLOCK_BITS) != BLOCK_SIZE
        || memcmp (buf, back, BLOCK_SIZE))
      atomic_fetch_add (&wrong, 1);
  }
  return NULL;
}

static void *
reader (void *number)
{
  unsigned seed = 100 + (unsigned) (uintptr_t) number;
  char *buf = malloc (64 * BLOCK_SIZE);
  while (!atomic_load (&stop)) {
    uint64_t block = (unsigned) rand_r (&seed) % (BLOCKS - 64);
    size_t count = (1 + (unsigned) rand_r (&seed) % 64) * BLOCK_SIZE;
    size_t done = hx_read (volume, buf, count, block << BLOCK_BITS);
    for (size_t at = 0; at < done / BLOCK_SIZE; at++)
      check ((const uint64_t *) (buf + at * BLOCK_SIZE), block + at, false);
    atomic_fetch_add (&reads, 1);
  }
  free (buf);
  return NULL;
}

static void *
flusher (void *number)
{
  (void) number;
  while (!atomic_load (&stop))
    atomic_fetch_add (hx_flush (volume) ? &flushes : &left, 1);
  return NULL;
}

static void
journal (struct hx_layer *layer, uint64_t epoch)
{
  hx_flush_lock (layer);
  if (epoch == 1)
    hx_journal_set (layer, HX_JOURNAL_FD, (uint64_t) temporary (HX_JOURNAL_SIZE, false));
  hx_journal_set (layer, HX_JOURNAL_AT, BLOCK_SIZE);
  hx_journal_set (layer, HX_JOURNAL_NUMBER, 0);
  hx_journal_set (layer, HX_JOURNAL_EPOCH, epoch);
  hx_flush_unlock (layer);
}

/* What Python does meanwhile: chunks come and go, marks are taken, ranges zeroed, layers pushed. */
static void
disturb (void)
{
  struct hx_file *files[BLOCKS * BLOCK_SIZE / CHUNK] = { NULL };
  uint64_t *numbers = malloc (sizeof *numbers * BLOCKS);
  uint8_t *states = malloc ((size_t) BLOCKS * GROUP);
  unsigned seed = 1000, count = 1;
  for (unsigned turn = 0; turn < turns; turn++) {
    unsigned chunk = (unsigned) rand_r (&seed) % (BLOCKS * BLOCK_SIZE / CHUNK);
    struct hx_file *file = hx_file_new (temporary (CHUNK, true), CHUNK);
    struct hx_layer *top = layers[count - 1];
    hx_table_put (table, chunk, file);
    if (files[chunk])
      hx_file_retire (files[chunk]);
    files[chunk] = file;
    hx_layer_lock (top);
    hx_recent_set (top, top->recent_fd, 64, 1 << 16, turn);
    if (hx_map_dirty (top->map) > BLOCKS)
      abort ();
    hx_map_take (top->map, numbers, states);
    hx_map_list (top->map, 0, UINT64_MAX, numbers, states, BLOCKS);
    hx_layer_unlock (top);
    journal (top, turn + 2);
    hx_layer_set_whole (top, turn % 5 == 0);
    uint64_t segments[4], sums[3];
    hx_layer_take (top, segments, 4);
    hx_map_sum (top->map, sums);
    /* Far from what the writers have. */
    hx_layer_lock (top);
    memset (states, HX_DATA, GROUP);
    hx_map_put (top->map, 1000 + turn, states, 1);
    hx_zeros_add (top->map, 1000 + turn, 1010 + turn);
    hx_map_drop (top->map, 1000 + turn);
    hx_layer_unlock (top);
    if (hx_zeros_change (top->map, 1000 + turn) <= 1000 + turn)
      abort ();
    hx_stripes_lock (volume, UINT64_MAX);
    hx_stripes_unlock (volume, UINT64_MAX);
    if (turn % 40 == 39 && count < 8) { /* a commit */
      struct hx_layer *fresh = hx_layer_new ((uint64_t) 1 << 40, (uint64_t) 1 << 40, 7);
      hx_layer_set_file (fresh, 0, temporary (0, false));
      journal (fresh, 1);
      hx_recent_set (fresh, temporary (1 << 16, false), 64, 1 << 16, 1);
      hx_gate_close (volume);
      layers[count++] = fresh;
      struct hx_layer *order[64];
      for (unsigned i = 0; i < count; i++)
        order[i] = layers[count - 1 - i];
      hx_layer_set_closed (top, 1);
      hx_layer_set_closed (fresh, 0);
      hx_volume_set (volume, order, count, table, 0);
      hx_gate_open (volume);
    }
  }
  atomic_store (&stop, true);
  for (unsigned i = 0; i < sizeof files / sizeof *files; i++)
    if (files[i])
      hx_file_retire (files[i]);
  free (numbers);
  free (states);
}

int
main (int argc, char **argv)
{
  pthread_t threads[WRITERS + READERS + FLUSHERS];
  if (argc > 1)
    turns = (unsigned) atoi (argv[1]);
  volume = hx_volume_new ();
  table = hx_table_new (CHUNK, 32);
  layers[0] = hx_layer_new ((uint64_t) 1 << 40, (uint64_t) 1 << 40, 7);
  hx_layer_set_file (layers[0], 0, temporary (0, false));
  journal (layers[0], 1);
  hx_recent_set (layers[0], temporary (1 << 16, false), 64, 1 << 16, 1);
  hx_layer_set_closed (layers[0], 0);
  hx_volume_set (volume, layers, 1, table, 0);
  for (uintptr_t i = 0; i < WRITERS + READERS + FLUSHERS; i++)
    if (pthread_create (&threads[i], NULL,
                        i < WRITERS             ? writer
                        : i < WRITERS + READERS ? reader
                                                : flusher,
                        (void *) i))
      die ("a thread");
  disturb ();
  for (unsigned i = 0; i < WRITERS + READERS + FLUSHERS; i++)
    pthread_join (threads[i], NULL);
  printf ("%lu reads, %lu writes, %lu flushes, %lu left to Python, %lu wrong\n", (unsigned long) reads,
          (unsigned long) writes, (unsigned long) flushes, (unsigned long) left, (unsigned long) wrong);
  hx_volume_set (volume, NULL, 0, NULL, 1);
  for (unsigned i = 0; i < 64 && layers[i]; i++) {
    close (layers[i]->fds[0]);
    close (layers[i]->recent_fd);
    close ((int) layers[i]->journal[HX_JOURNAL_FD]);
    hx_layer_free (layers[i]);
  }
  hx_table_free (table);
  hx_volume_free (volume);
  return wrong != 0;
}
