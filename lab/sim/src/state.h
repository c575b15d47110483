/* The simulated machine: one text file, read by every process, replaced as a whole by whoever changes it. */
#ifndef STATE_H
#define STATE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nvml_abi.h"
#include "tables.h"

enum { MAX_GPUS = 16, MAX_GIS = 128, MAX_CIS = 128, MAX_PROCESSES = 256, MAX_XIDS = 256 };

/* "No instance": written `-` in the file, and what NVML itself reports for a process outside MIG. */
#define NO_INSTANCE 0xFFFFFFFFu

/* Which calls do not return while it lasts. */
enum hang { NOTHING_HANGS, INIT_HANGS, CALLS_HANG, CHANGES_HANG };

struct driver {
    char version[80];
    unsigned loaded, mismatch, permit_any, boot, slow_ms;
    unsigned hangs; /* an enum hang */
    uint64_t seed, next; /* `next` numbers whatever must never repeat: MIG UUIDs and Xids */
};

struct gpu {
    unsigned minor; /* what the other records and every handle call this GPU, whatever its index is */
    char model[32], uuid[48], pci[32], serial[24];
    unsigned mig, pending, passthrough, persistence, lost, busy, holes, utilization, temperature;
    unsigned remap_corrected, remap_uncorrected, remap_pending, remap_failed, retired, retired_pending;
    unsigned ecc_corrected, ecc_uncorrected;
};

struct gi {
    unsigned gpu, id, profile, start, busy;
};

struct ci {
    unsigned gpu, gi, id, profile, start, busy;
    char uuid[48];
};

struct process {
    unsigned gpu, gi, ci, pid, mib;
    char type[4]; /* C compute, G graphics */
};

struct xid {
    unsigned gpu, code;
    uint64_t number;
};

struct state {
    struct driver driver;
    unsigned gpu_count, gi_count, ci_count, process_count, xid_count;
    struct gpu gpus[MAX_GPUS]; /* in the order of NVML's indices */
    struct gi gis[MAX_GIS];    /* by GPU and id, so that larger instances come first */
    struct ci cis[MAX_CIS];
    struct process processes[MAX_PROCESSES];
    struct xid xids[MAX_XIDS];
};

/* The machine as the file has it now; cheap when nothing changed. A missing file is a driver that is not loaded. There
 * is one machine in memory: two threads must not ask at the same time. */
nvmlReturn_t state_refresh(struct state **state);

/* Hold the file's lock from here to state_unlock: what is read in between is what is changed. */
nvmlReturn_t state_lock(int *lock);
void state_unlock(int *lock);
nvmlReturn_t state_write(const struct state *state);

const struct model *gpu_model(const struct gpu *gpu);
struct gpu *find_gpu(struct state *state, unsigned minor);
struct gi *find_gi(struct state *state, unsigned gpu, unsigned id);
struct ci *find_ci(struct state *state, unsigned gpu, unsigned gi, unsigned id);

#endif
