#define _GNU_SOURCE
#include "sim.h"

#include <stdio.h>
#include <string.h>

static const struct profile *gi_profile(const struct session *s)
{
    return profile_by_id(gpu_model(s->gpu), s->gi->profile);
}

/* `1g.10gb`, or `1c.3g.40gb` where the GPU instance is divided further. */
static void mig_name(const struct session *s, char *out, size_t length)
{
    const struct profile *profile = gi_profile(s);
    unsigned slices = ci_slices(gpu_model(s->gpu), s->gi, s->ci->profile);
    if (slices == profile->slices)
        snprintf(out, length, "%s MIG %s", gpu_model(s->gpu)->name, profile->name);
    else
        snprintf(out, length, "%s MIG %uc.%s", gpu_model(s->gpu)->name, slices, profile->name);
}

NVML_API nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned length)
{
    ENTER(device, ANY_DEVICE);
    char text[96];
    if (s.ci)
        mig_name(&s, text, sizeof text);
    return copy_text(name, length, s.ci ? text : gpu_model(s.gpu)->name);
}

NVML_API nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned length)
{
    ENTER(device, ANY_DEVICE);
    return copy_text(uuid, length, s.ci ? s.ci->uuid : s.gpu->uuid);
}

NVML_API nvmlDeviceGetSerial(nvmlDevice_t device, char *serial, unsigned length)
{
    ENTER(device, WHOLE_GPU);
    return copy_text(serial, length, s.gpu->serial);
}

NVML_API nvmlDeviceGetIndex(nvmlDevice_t device, unsigned *index)
{
    ENTER(device, ANY_DEVICE);
    REQUIRE(index, NVML_ERROR_INVALID_ARGUMENT);
    *index = (unsigned)(s.gpu - s.state->gpus);
    if (s.ci)
        for (*index = 0; mig_at(&s, *index) != s.ci;)
            ++*index;
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetMinorNumber(nvmlDevice_t device, unsigned *minor)
{
    ENTER(device, WHOLE_GPU);
    REQUIRE(minor, NVML_ERROR_INVALID_ARGUMENT);
    *minor = s.gpu->minor;
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, nvmlPciInfo_t *pci)
{
    ENTER(device, WHOLE_GPU);
    REQUIRE(pci, NVML_ERROR_INVALID_ARGUMENT);
    memset(pci, 0, sizeof(*pci));
    sscanf(s.gpu->pci, "%x:%x:%x", &pci->domain, &pci->bus, &pci->device);
    snprintf(pci->busId, sizeof pci->busId, "%08X:%02X:%02X.0", pci->domain, pci->bus, pci->device);
    snprintf(pci->busIdLegacy, sizeof pci->busIdLegacy, "%04X:%02X:%02X.0", pci->domain & 0xFFFF, pci->bus & 0xFF,
             pci->device & 0xFF);
    pci->pciDeviceId = gpu_model(s.gpu)->pci_device << 16 | 0x10DE;
    pci->pciSubSystemId = 0x10DE;
    return NVML_SUCCESS;
}

static nvmlReturn_t memory(nvmlDevice_t device, nvmlMemory_v2_t *out)
{
    ENTER(device, ANY_DEVICE);
    const uint64_t mib = 1024 * 1024;
    unsigned gi = s.gi ? s.gi->id : NO_INSTANCE;
    out->total = (s.gi ? gi_profile(&s)->mib : gpu_model(s.gpu)->mib) * mib;
    out->reserved = (s.gi ? 0 : gpu_model(s.gpu)->mib / 128) * mib;
    out->used = memory_used_mib(s.state, s.gpu, gi, NO_INSTANCE) * mib; /* compute instances share their memory */
    if (out->used > out->total - out->reserved)
        out->used = out->total - out->reserved;
    out->free = out->total - out->reserved - out->used;
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *out)
{
    nvmlMemory_v2_t full;
    REQUIRE(out, NVML_ERROR_INVALID_ARGUMENT);
    nvmlReturn_t result = memory(device, &full);
    if (!result) /* the first version counts what is reserved as used */
        *out = (nvmlMemory_t){.total = full.total, .free = full.free, .used = full.used + full.reserved};
    return result;
}

NVML_API nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t *out)
{
    REQUIRE(out, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(out->version == NVML_STRUCT_VERSION(nvmlMemory_v2_t, 2), NVML_ERROR_ARGUMENT_VERSION_MISMATCH);
    return memory(device, out);
}

/* There is no utilisation of a MIG device, nor of a GPU that is in MIG mode. */
NVML_API nvmlDeviceGetUtilizationRates(nvmlDevice_t device, nvmlUtilization_t *out)
{
    ENTER(device, WHOLE_GPU);
    REQUIRE(out, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(!s.gpu->mig, NVML_ERROR_NOT_SUPPORTED);
    *out = (nvmlUtilization_t){.gpu = s.gpu->utilization, .memory = s.gpu->utilization / 2};
    return NVML_SUCCESS;
}

/* In MIG mode the GPU itself tells of all its instances, but only to who may see them all. */
static nvmlReturn_t list_processes(nvmlDevice_t device, char type, unsigned *count, nvmlProcessInfo_t *out)
{
    ENTER(device, ANY_DEVICE);
    REQUIRE(count, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(s.ci || !s.gpu->mig || permitted(s.state), NVML_ERROR_NO_PERMISSION);
    unsigned room = out ? *count : 0, found = 0;
    for (const struct process *it = s.state->processes; it < s.state->processes + s.state->process_count; it++) {
        if (it->gpu != s.gpu->minor || !strchr(it->type, type) || (s.ci && (it->gi != s.gi->id || it->ci != s.ci->id)))
            continue;
        if (found++ < room)
            out[found - 1] = (nvmlProcessInfo_t){it->pid, (nvmlU64)it->mib << 20, it->gi, it->ci};
    }
    *count = found;
    return found > room ? NVML_ERROR_INSUFFICIENT_SIZE : NVML_SUCCESS;
}

NVML_API nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned *count, nvmlProcessInfo_t *out)
{
    return list_processes(device, 'C', count, out);
}

NVML_API nvmlDeviceGetComputeRunningProcesses_v2(nvmlDevice_t device, unsigned *count, nvmlProcessInfo_t *out)
{
    return list_processes(device, 'C', count, out);
}

NVML_API nvmlDeviceGetGraphicsRunningProcesses_v3(nvmlDevice_t device, unsigned *count, nvmlProcessInfo_t *out)
{
    return list_processes(device, 'G', count, out);
}

NVML_API nvmlDeviceGetMPSComputeRunningProcesses_v3(nvmlDevice_t device, unsigned *count, nvmlProcessInfo_t *out)
{
    return list_processes(device, 'M', count, out);
}

NVML_API nvmlDeviceGetAttributes_v2(nvmlDevice_t device, nvmlDeviceAttributes_t *out)
{
    ENTER(device, MIG_DEVICE);
    REQUIRE(out, NVML_ERROR_INVALID_ARGUMENT);
    const struct profile *profile = gi_profile(&s);
    unsigned slices = ci_slices(gpu_model(s.gpu), s.gi, s.ci->profile);
    *out = (nvmlDeviceAttributes_t){
        .multiprocessorCount = slices == profile->slices ? profile->sm : slices * slice_multiprocessors(gpu_model(s.gpu)),
        .sharedCopyEngineCount = profile->copy,
        .sharedDecoderCount = profile->decoders,
        .sharedEncoderCount = profile->encoders,
        .sharedJpegCount = profile->jpeg,
        .sharedOfaCount = profile->ofa,
        .gpuInstanceSliceCount = profile->slices,
        .computeInstanceSliceCount = slices,
        .memorySizeMB = profile->mib,
    };
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetArchitecture(nvmlDevice_t device, unsigned *architecture)
{
    ENTER(device, ANY_DEVICE);
    REQUIRE(architecture, NVML_ERROR_INVALID_ARGUMENT);
    *architecture = gpu_model(s.gpu)->architecture;
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetCudaComputeCapability(nvmlDevice_t device, int *major, int *minor)
{
    ENTER(device, ANY_DEVICE);
    REQUIRE(major && minor, NVML_ERROR_INVALID_ARGUMENT);
    *major = (int)gpu_model(s.gpu)->cc_major;
    *minor = (int)gpu_model(s.gpu)->cc_minor;
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetComputeMode(nvmlDevice_t device, unsigned *mode)
{
    ENTER(device, ANY_DEVICE);
    REQUIRE(mode, NVML_ERROR_INVALID_ARGUMENT);
    *mode = 0; /* default: shared between processes; the exclusive modes do not go with MIG */
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetPersistenceMode(nvmlDevice_t device, unsigned *mode)
{
    ENTER(device, WHOLE_GPU);
    REQUIRE(mode, NVML_ERROR_INVALID_ARGUMENT);
    *mode = s.gpu->persistence;
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceSetPersistenceMode(nvmlDevice_t device, unsigned mode)
{
    ENTER_TO_CHANGE(device, WHOLE_GPU);
    REQUIRE(mode <= 1, NVML_ERROR_INVALID_ARGUMENT);
    s.gpu->persistence = mode;
    return state_write(s.state);
}

/* A server with two sockets: neighbours share a PCIe switch, each half of the GPUs a socket. */
NVML_API nvmlDeviceGetTopologyCommonAncestor(nvmlDevice_t one, nvmlDevice_t other, unsigned *level)
{
    unsigned first;
    {
        ENTER(one, WHOLE_GPU);
        first = s.gpu->minor;
    }
    ENTER(other, WHOLE_GPU);
    REQUIRE(level, NVML_ERROR_INVALID_ARGUMENT);
    unsigned second = s.gpu->minor, half = (s.state->gpu_count + 1) / 2;
    *level = first == second             ? NVML_TOPOLOGY_INTERNAL
             : first / 2 == second / 2   ? NVML_TOPOLOGY_MULTIPLE
             : first / half == second / half ? NVML_TOPOLOGY_NODE
                                         : NVML_TOPOLOGY_SYSTEM;
    return NVML_SUCCESS;
}
