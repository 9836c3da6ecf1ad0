/* A stack of layers over a base, and the requests that are served from it. */
#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

struct hx_volume {
  pthread_rwlock_t gate, stack;
  pthread_mutex_t stripes[STRIPES];
  struct hx_layer **layers;
  size_t count;
  struct hx_table *base;
  bool read_only;
  _Atomic uint64_t sums[SUMS], flushes[BOUNDS + 1], flush_time;
};

struct hx_volume *
hx_volume_new (void)
{
  struct hx_volume *volume = calloc (1, sizeof *volume);
  pthread_rwlockattr_t attributes;
  if (!volume)
    return NULL;
  /* Else a commit would wait for as long as there is somebody who writes. */
  pthread_rwlockattr_init (&attributes);
  pthread_rwlockattr_setkind_np (&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
  pthread_rwlock_init (&volume->gate, &attributes);
  pthread_rwlock_init (&volume->stack, &attributes);
  pthread_rwlockattr_destroy (&attributes);
  for (unsigned i = 0; i < STRIPES; i++)
    pthread_mutex_init (&volume->stripes[i], NULL);
  volume->read_only = true;
  return volume;
}

void
hx_volume_free (struct hx_volume *volume)
{
  if (!volume)
    return;
  free (volume->layers);
  free (volume);
}

int
hx_volume_set (struct hx_volume *volume, struct hx_layer **layers, size_t count,
               struct hx_table *base, int read_only)
{
  struct hx_layer **copy = malloc ((count + 1) * sizeof *copy), **old;
  if (!copy)
    return HX_NO_MEMORY;
  for (size_t i = 0; i < count; i++)
    copy[i] = layers[i];
  pthread_rwlock_wrlock (&volume->stack);
  old = volume->layers;
  volume->layers = copy;
  volume->count = count;
  volume->base = base;
  volume->read_only = read_only || !count;
  pthread_rwlock_unlock (&volume->stack);
  free (old);
  return 0;
}

void
hx_gate_enter (struct hx_volume *volume)
{
  pthread_rwlock_rdlock (&volume->gate);
}

void
hx_gate_leave (struct hx_volume *volume)
{
  pthread_rwlock_unlock (&volume->gate);
}

void
hx_gate_close (struct hx_volume *volume)
{
  pthread_rwlock_wrlock (&volume->gate);
}

void
hx_gate_open (struct hx_volume *volume)
{
  pthread_rwlock_unlock (&volume->gate);
}

void
hx_stripes_lock (struct hx_volume *volume, uint64_t which)
{
  for (unsigned i = 0; i < STRIPES; i++) /* in one order, so that no two wait for each other */
    if (which >> i & 1)
      pthread_mutex_lock (&volume->stripes[i]);
}

void
hx_stripes_unlock (struct hx_volume *volume, uint64_t which)
{
  for (unsigned i = 0; i < STRIPES; i++)
    if (which >> i & 1)
      pthread_mutex_unlock (&volume->stripes[i]);
}

void
hx_volume_sums (struct hx_volume *volume, uint64_t sums[SUMS])
{
  for (int i = 0; i < SUMS; i++)
    sums[i] = atomic_load (&volume->sums[i]);
}

static void
add (struct hx_volume *volume, int what, size_t bytes)
{
  atomic_fetch_add_explicit (&volume->sums[what], 1, memory_order_relaxed);
  atomic_fetch_add_explicit (&volume->sums[what + 1], bytes, memory_order_relaxed);
}

bool
read_all (int fd, void *buf, size_t count, uint64_t offset)
{
  char *at = buf;
  while (count) {
    ssize_t got = pread (fd, at, count, (off_t) offset);
    if (got < 0 && errno == EINTR)
      continue;
    if (got <= 0)
      return false;
    at += got;
    count -= (size_t) got;
    offset += (uint64_t) got;
  }
  return true;
}

bool
write_all (int fd, const void *buf, size_t count, uint64_t offset)
{
  const char *at = buf;
  while (count) {
    ssize_t done = pwrite (fd, at, count, (off_t) offset);
    if (done < 0 && errno == EINTR)
      continue;
    if (done <= 0)
      return false;
    at += done;
    count -= (size_t) done;
    offset += (uint64_t) done;
  }
  return true;
}

/* The descriptor of the data file that has [offset, offset + count), which may be cut shorter where
 * it ends; in *at where it begins in there. -1 if it is not open. */
static int
file_of (struct hx_layer *layer, uint64_t offset, size_t *count, uint64_t *at)
{
  uint64_t segment = offset / layer->segment_size;
  *at = offset % layer->segment_size;
  if (*count > layer->segment_size - *at)
    *count = layer->segment_size - *at;
  return segment < layer->segments ? atomic_load (&layer->fds[segment]) : -1;
}

/* Read the first piece of a request that lies alike: bytes done, 0 if it is not here. */
static size_t
read_piece (struct hx_volume *volume, char *buf, size_t count, uint64_t offset)
{
  uint64_t block = offset >> BLOCK_BITS, at;
  uint64_t stop = (offset + count + BLOCK_SIZE - 1) >> BLOCK_BITS;
  int state = HX_BASE;
  size_t depth;
  for (depth = 0; depth < volume->count; depth++) {
    state = map_run (volume->layers[depth]->map, block, stop, &stop);
    if (state != HX_BASE)
      break;
  }
  uint64_t end = stop << BLOCK_BITS;
  if (end < offset + count)
    count = end - offset;
  if (state == HX_ZERO) {
    memset (buf, 0, count);
    return count;
  }
  if (state == HX_DATA) {
    int fd = file_of (volume->layers[depth], offset, &count, &at);
    return fd >= 0 && read_all (fd, buf, count, at) ? count : 0;
  }
  if (!volume->base)
    return 0;
  uint64_t chunk_size = table_chunk_size (volume->base);
  if (count > chunk_size - offset % chunk_size)
    count = chunk_size - offset % chunk_size;
  state = table_read (volume->base, buf, count, offset);
  if (state == HX_DATA)
    atomic_fetch_add_explicit (&volume->sums[4], 1, memory_order_relaxed);
  return state == HX_ABSENT ? 0 : count;
}

size_t
hx_read (struct hx_volume *volume, void *buf, size_t count, uint64_t offset)
{
  size_t done = 0, piece;
  pthread_rwlock_rdlock (&volume->stack);
  while (done < count
         && (piece = read_piece (volume, (char *) buf + done, count - done, offset + done)))
    done += piece;
  pthread_rwlock_unlock (&volume->stack);
  if (done)
    add (volume, 0, done);
  return done;
}

static bool
write_data (struct hx_layer *layer, const char *buf, size_t count, uint64_t offset)
{
  uint64_t first = offset >> BLOCK_BITS;
  uint64_t stop = (offset + count + BLOCK_SIZE - 1) >> BLOCK_BITS;
  while (count) {
    size_t piece = count;
    uint64_t at;
    int fd = file_of (layer, offset, &piece, &at);
    if (fd < 0 || !write_all (fd, buf, piece, at))
      return false;
    /* After the bytes are there, so that the flush that takes it syncs them. */
    hx_layer_touch (layer, offset / layer->segment_size);
    buf += piece;
    count -= piece;
    offset += piece;
  }
  hx_layer_wrote (layer, first, stop);
  return true;
}

static bool
all_data (struct hx_map *map, uint64_t first, uint64_t stop)
{
  while (first < stop)
    if (map_run (map, first, stop, &first) != HX_DATA)
      return false;
  return true;
}

/* Whole blocks, under their stripes: as Overlay._write_fresh and Layer.mark do it. */
static bool
write_fresh (struct hx_volume *volume, struct hx_layer *top, const char *buf, size_t count,
             uint64_t offset)
{
  uint64_t first = offset >> BLOCK_BITS, stop = (offset + count) >> BLOCK_BITS;
  uint64_t low = first >> GROUP_BITS, high = (stop - 1) >> GROUP_BITS, wanted = 0;
  bool done = false;
  for (uint64_t group = low; group <= high && group < low + STRIPES; group++)
    wanted |= (uint64_t) 1 << group % STRIPES;
  hx_stripes_lock (volume, wanted);
  if (write_data (top, buf, count, offset)) {
    pthread_mutex_lock (&top->lock);
    /* Noted before it is marked, so that the mark survives this process. Where nothing can be
       noted, the other part flushes each mark. */
    done = !atomic_load (&top->closed) && top->recent_fd >= 0
           && hx_note (top, first, (stop - first) << 2 | HX_DATA) == 1
           && map_mark_data (top->map, first, stop) == 0;
    if (done) /* with the mark, so that no flush takes one without the other */
      hx_layer_wrote (top, first, stop);
    pthread_mutex_unlock (&top->lock);
  }
  hx_stripes_unlock (volume, wanted);
  return done;
}

int
hx_write (struct hx_volume *volume, const void *buf, size_t count, uint64_t offset)
{
  uint64_t first = offset >> BLOCK_BITS;
  uint64_t stop = (offset + count + BLOCK_SIZE - 1) >> BLOCK_BITS;
  bool done = false;
  pthread_rwlock_rdlock (&volume->gate);
  pthread_rwlock_rdlock (&volume->stack);
  if (!volume->read_only && count) {
    struct hx_layer *top = volume->layers[0];
    if (atomic_load (&top->closed))
      ;
    else if (all_data (top->map, first, stop))
      done = write_data (top, buf, count, offset);
    else if (!((offset | count) & (BLOCK_SIZE - 1)))
      done = write_fresh (volume, top, buf, count, offset);
  }
  pthread_rwlock_unlock (&volume->stack);
  pthread_rwlock_unlock (&volume->gate);
  if (done)
    add (volume, 2, count);
  return done;
}

static const double bounds[BOUNDS] /* figures.py has the same */
  = { 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0 };

static uint64_t
now (void)
{
  struct timespec time;
  clock_gettime (CLOCK_MONOTONIC, &time);
  return (uint64_t) time.tv_sec * 1000000000u + (uint64_t) time.tv_nsec;
}

int
hx_flush (struct hx_volume *volume)
{
  bool done = false;
  uint64_t began = now (), took;
  pthread_rwlock_rdlock (&volume->stack);
  if (!volume->read_only) /* the layers below were flushed when they were frozen */
    done = layer_flush (volume->layers[0]);
  pthread_rwlock_unlock (&volume->stack);
  if (!done)
    return 0;
  unsigned within = 0;
  took = now () - began;
  while (within < BOUNDS && (double) took > bounds[within] * 1e9)
    within++;
  atomic_fetch_add_explicit (&volume->flushes[within], 1, memory_order_relaxed);
  atomic_fetch_add_explicit (&volume->flush_time, took, memory_order_relaxed);
  return 1;
}

uint64_t
hx_volume_flushes (struct hx_volume *volume, uint64_t counts[BOUNDS + 1])
{
  for (unsigned i = 0; i <= BOUNDS; i++)
    counts[i] = atomic_load (&volume->flushes[i]);
  return atomic_load (&volume->flush_time);
}
