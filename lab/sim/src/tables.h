/* What each GPU model is and how MIG may cut it. Data only: figures come from NVIDIA's MIG guide and transcripts. */
#ifndef TABLES_H
#define TABLES_H

#include <stdbool.h>
#include <stddef.h>

enum { MAX_STARTS = 8 };

/* `enumeration` is the number a caller asks with, `id` the one the driver answers with; they differ. */
struct profile {
    unsigned enumeration, id;
    const char *name;
    unsigned slices, max, mib, sm, copy, decoders, encoders, jpeg, ofa;
    unsigned size, starts; /* placement: length in memory slices, and how many starts follow */
    unsigned start[MAX_STARTS];
};

struct model {
    const char *key, *name;
    unsigned architecture, cc_major, cc_minor, pci_device, mib, watts;
    bool reset_for_mig; /* changing the MIG mode resets the GPU, and the mode outlives a reboot */
    unsigned memory_slices, max_mig_devices;
    const struct profile *profiles; /* ends with a NULL name; NULL itself on a GPU without MIG */
};

extern const struct model models[]; /* ends with a NULL key */

const struct model *model_named(const char *key);
const struct profile *profile_by_enumeration(const struct model *model, unsigned enumeration);
const struct profile *profile_by_id(const struct model *model, unsigned id);

/* One compute slice's multiprocessors on this model. */
unsigned slice_multiprocessors(const struct model *model);

/* Whether the profile claims the media engines of which a GPU has one set: such an instance exists at most once. */
bool takes_media(const struct profile *profile);

#endif
