/* How an NVML call gets at the simulated machine. */
#ifndef SIM_H
#define SIM_H

#include "state.h"

#define NVML_API __attribute__((visibility("default"))) nvmlReturn_t

/* What a call works on. Its scope is the call: leaving it gives back the locks. */
struct session {
    struct state *state;
    struct gpu *gpu; /* the GPU a handle names, or the parent of the instance it names */
    struct gi *gi;
    struct ci *ci;
    int lock;
    bool entered;
};

enum want { ANY_DEVICE, WHOLE_GPU, MIG_DEVICE, GPU_INSTANCE, COMPUTE_INSTANCE };

nvmlReturn_t session_open(struct session *session);
nvmlReturn_t session_enter(struct session *session, const void *handle, enum want want);
void session_leave(struct session *session);

/* Whoever changes the GPU must be root, unless the state says that anybody may. */
bool permitted(const struct state *state);

/* From here on the state is locked against other processes, and what was read before is read again. */
nvmlReturn_t session_change(struct session *session, const void *handle, enum want want);

void *gpu_handle(const struct gpu *gpu);
void *mig_handle(const struct ci *ci);
void *gi_handle(const struct gi *gi);
void *ci_handle(const struct ci *ci);

/* The device at this MIG index, or NULL: instances in order, with the injected holes left free. */
struct ci *mig_at(struct session *session, unsigned index);

/* Whether a client holds the GPU, one instance or one compute instance (NO_INSTANCE widens the question). */
bool in_use(const struct state *state, const struct gpu *gpu, unsigned gi, unsigned ci);

uint64_t memory_used_mib(const struct state *state, const struct gpu *gpu, unsigned gi, unsigned ci);
unsigned ci_slices(const struct model *model, const struct gi *gi, unsigned profile);
nvmlReturn_t copy_text(char *out, unsigned length, const char *text);

#define SESSION(name) __attribute__((cleanup(session_leave))) struct session name = {.lock = -1}

/* Open a session `s` on what `handle` names, or return NVML's reason why not. */
#define ENTER(handle, want)                                          \
    SESSION(s);                                                      \
    do {                                                             \
        nvmlReturn_t refused_ = session_enter(&s, (handle), (want)); \
        if (refused_)                                                \
            return refused_;                                         \
    } while (0)

#define ENTER_TO_CHANGE(handle, want)                                 \
    SESSION(s);                                                       \
    do {                                                              \
        nvmlReturn_t refused_ = session_change(&s, (handle), (want)); \
        if (refused_)                                                 \
            return refused_;                                          \
    } while (0)

#define REQUIRE(condition, otherwise) \
    do {                              \
        if (!(condition))             \
            return otherwise;         \
    } while (0)

#endif
