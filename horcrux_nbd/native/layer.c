/* One layer of the overlay: its data files, what of them is dirty, and marks noted in `recent`. */
#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_SEGMENTS 65536 /* 64 PiB of image; what lies beyond is left to Python */

struct hx_layer *
hx_layer_new (uint64_t size, uint64_t segment_size, uint64_t seed)
{
  struct hx_layer *layer = calloc (1, sizeof *layer);
  if (!layer)
    return NULL;
  layer->segment_size = segment_size;
  layer->seed = seed;
  layer->journal[HX_JOURNAL_FD] = (uint64_t) -1;
  layer->segments = size / segment_size + 1;
  if (layer->segments > MAX_SEGMENTS)
    layer->segments = MAX_SEGMENTS;
  layer->fds = malloc (layer->segments * sizeof *layer->fds);
  layer->dirty = calloc (layer->segments, sizeof *layer->dirty);
  layer->map = hx_map_new ();
  if (!layer->fds || !layer->dirty || !layer->map) {
    hx_layer_free (layer);
    return NULL;
  }
  for (uint64_t i = 0; i < layer->segments; i++)
    atomic_init (&layer->fds[i], -1);
  atomic_init (&layer->closed, 1);
  pthread_mutex_init (&layer->lock, NULL);
  pthread_mutex_init (&layer->writing, NULL);
  pthread_mutex_init (&layer->flushing, NULL);
  layer->recent_fd = -1;
  return layer;
}

void
hx_layer_free (struct hx_layer *layer)
{
  if (!layer)
    return;
  hx_map_free (layer->map);
  free (layer->fds);
  free (layer->dirty);
  free (layer->record);
  free (layer);
}

struct hx_map *
hx_layer_map (struct hx_layer *layer)
{
  return layer->map;
}

void
hx_layer_lock (struct hx_layer *layer)
{
  pthread_mutex_lock (&layer->lock);
}

void
hx_layer_unlock (struct hx_layer *layer)
{
  pthread_mutex_unlock (&layer->lock);
}

int
hx_layer_set_file (struct hx_layer *layer, uint64_t segment, int fd)
{
  if (segment >= layer->segments)
    return HX_ABSENT;
  atomic_store (&layer->fds[segment], fd);
  return 0;
}

void
hx_layer_set_closed (struct hx_layer *layer, int closed)
{
  atomic_store (&layer->closed, closed);
}

int
hx_layer_touch (struct hx_layer *layer, uint64_t segment)
{
  if (segment >= layer->segments)
    return HX_ABSENT;
  if (!atomic_load (&layer->dirty[segment]))
    atomic_store (&layer->dirty[segment], 1);
  return 0;
}

void
hx_layer_wrote (struct hx_layer *layer, uint64_t first, uint64_t stop)
{
  if (atomic_load (&layer->written_many))
    return; /* or it is being taken now, and whoever does that syncs the files next */
  pthread_mutex_lock (&layer->writing);
  if (layer->written_count == HX_MOST_WRITTEN || stop - first > HX_MOST_WRITTEN)
    atomic_store (&layer->written_many, 1);
  else
    layer->written[layer->written_count++] = (struct hx_range) { first, stop };
  pthread_mutex_unlock (&layer->writing);
}

int
hx_layer_take_written (struct hx_layer *layer, uint64_t *firsts, uint64_t *stops)
{
  int count;
  pthread_mutex_lock (&layer->writing);
  count = (int) layer->written_count;
  for (int i = 0; i < count; i++) {
    firsts[i] = layer->written[i].first;
    stops[i] = layer->written[i].stop;
  }
  if (atomic_exchange (&layer->written_many, 0))
    count = -1;
  layer->written_count = 0;
  pthread_mutex_unlock (&layer->writing);
  return count;
}

uint64_t
hx_layer_take (struct hx_layer *layer, uint64_t *segments, uint64_t room)
{
  uint64_t count = 0;
  for (uint64_t i = 0; i < layer->segments && count < room; i++)
    if (atomic_load (&layer->dirty[i]) && atomic_exchange (&layer->dirty[i], 0))
      segments[count++] = i;
  return count;
}

/* ---- recent.py has the layout */

struct entry {
  uint64_t first, what;
  uint32_t generation, checksum;
};

_Static_assert (sizeof (struct entry) == 24, "recent.py, ENTRY");
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "recent is little-endian"
#endif

static uint32_t
crc32_of (const void *data, size_t length)
{
  const uint8_t *at = data;
  uint32_t crc = 0xFFFFFFFFu;
  while (length--) {
    crc ^= *at++;
    for (int bit = 0; bit < 8; bit++)
      crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
  }
  return ~crc;
}

void
hx_recent_set (struct hx_layer *layer, int fd, uint64_t at, uint64_t end, uint32_t generation)
{
  layer->recent_fd = fd;
  layer->recent_at = at;
  layer->recent_end = end;
  layer->generation = generation;
}

uint64_t
hx_recent_at (struct hx_layer *layer)
{
  return layer->recent_at;
}

int
hx_note (struct hx_layer *layer, uint64_t first, uint64_t what)
{
  struct entry entry = { first, what, layer->generation, 0 };
  if (layer->recent_fd < 0)
    return 1;
  if (layer->recent_at + sizeof entry > layer->recent_end)
    return 0;
  entry.checksum = crc32_of (&entry, sizeof entry);
  errno = EIO; /* for a short write */
  if (pwrite (layer->recent_fd, &entry, sizeof entry, (off_t) layer->recent_at)
      != (ssize_t) sizeof entry)
    return -errno;
  layer->recent_at += sizeof entry;
  return 1;
}
