/* The nbdkit filter: what is local is served here, the rest goes on to the Python plugin. */
#include "core.h"

#include <nbdkit-filter.h>

static _Atomic (struct hx_volume *) served;
static atomic_bool loaded;

HX_API int hx_abi (void);
HX_API int hx_filter_loaded (void);
HX_API void hx_serve (struct hx_volume *volume);

int
hx_abi (void)
{
  return HX_ABI;
}

/* Whether this instance is the one that nbdkit has as a filter. */
int
hx_filter_loaded (void)
{
  return atomic_load (&loaded);
}

/* Requests are served from `volume` from here on; NULL: by Python alone. */
void
hx_serve (struct hx_volume *volume)
{
  atomic_store (&served, volume);
}

static void
filter_load (void)
{
  atomic_store (&loaded, true);
}

static int
filter_pread (nbdkit_next *next, void *handle, void *buf, uint32_t count, uint64_t offset,
              uint32_t flags, int *err)
{
  struct hx_volume *volume = atomic_load (&served);
  size_t done = volume ? hx_read (volume, buf, count, offset) : 0;
  (void) handle;
  if (done == count)
    return 0;
  return next->pread (next, (char *) buf + done, (uint32_t) (count - done), offset + done, flags,
                      err);
}

static int
filter_flush (nbdkit_next *next, void *handle, uint32_t flags, int *err)
{
  struct hx_volume *volume = atomic_load (&served);
  (void) handle;
  return volume && hx_flush (volume) ? 0 : next->flush (next, flags, err);
}

static int
filter_pwrite (nbdkit_next *next, void *handle, const void *buf, uint32_t count, uint64_t offset,
               uint32_t flags, int *err)
{
  struct hx_volume *volume = atomic_load (&served);
  if (!volume || !hx_write (volume, buf, count, offset))
    return next->pwrite (next, buf, count, offset, flags, err);
  return flags & NBDKIT_FLAG_FUA ? filter_flush (next, handle, 0, err) : 0;
}

static struct nbdkit_filter filter = {
  .name = "horcrux",
  .longname = "nbdkit filter of Horcrux",
  .description = "serves what is local of a volume, for the plugin of Horcrux below it",
  .load = filter_load,
  .pread = filter_pread,
  .pwrite = filter_pwrite,
  .flush = filter_flush,
};

NBDKIT_REGISTER_FILTER (filter)
