#include "tables.h"

#include <string.h>

#define SEVEN_STARTS 1, 7, {0, 1, 2, 3, 4, 5, 6}
#define PAIR_STARTS 2, 4, {0, 2, 4, 6}
#define TWO_SLICE_STARTS 2, 3, {0, 2, 4}
#define HALF_STARTS 4, 2, {0, 4}
#define LOWER_HALF 4, 1, {0}
#define WHOLE 8, 1, {0}

/* enum id name slices max MiB SM | copy dec enc jpeg ofa | size starts {start...} */
static const struct profile a100_40[] = {
    {0x0, 19, "1g.5gb", 1, 7, 4864, 14, 1, 0, 0, 0, 0, SEVEN_STARTS},
    {0x7, 20, "1g.5gb+me", 1, 1, 4864, 14, 1, 1, 0, 1, 1, SEVEN_STARTS},
    {0x9, 15, "1g.10gb", 1, 4, 9856, 14, 1, 1, 0, 0, 0, PAIR_STARTS},
    {0x1, 14, "2g.10gb", 2, 3, 9856, 28, 2, 1, 0, 0, 0, TWO_SLICE_STARTS},
    {0x2, 9, "3g.20gb", 3, 2, 19968, 42, 3, 2, 0, 0, 0, HALF_STARTS},
    {0x3, 5, "4g.20gb", 4, 1, 19968, 56, 4, 2, 0, 0, 0, LOWER_HALF},
    {0x4, 0, "7g.40gb", 7, 1, 40192, 98, 7, 5, 0, 1, 1, WHOLE},
    {0},
};

static const struct profile a100_80[] = {
    {0x0, 19, "1g.10gb", 1, 7, 9856, 14, 1, 1, 0, 0, 0, SEVEN_STARTS},
    {0x7, 20, "1g.10gb+me", 1, 1, 9856, 14, 1, 1, 0, 1, 1, SEVEN_STARTS},
    {0x9, 15, "1g.20gb", 1, 4, 19968, 14, 1, 1, 0, 0, 0, PAIR_STARTS},
    {0x1, 14, "2g.20gb", 2, 3, 19968, 28, 2, 1, 0, 0, 0, TWO_SLICE_STARTS},
    {0x2, 9, "3g.40gb", 3, 2, 40192, 42, 3, 2, 0, 0, 0, HALF_STARTS},
    {0x3, 5, "4g.40gb", 4, 1, 40192, 56, 4, 2, 0, 0, 0, LOWER_HALF},
    {0x4, 0, "7g.80gb", 7, 1, 80384, 98, 7, 5, 0, 1, 1, WHOLE},
    {0},
};

static const struct profile a30[] = {
    {0x0, 14, "1g.6gb", 1, 4, 5952, 14, 1, 0, 0, 0, 0, 1, 4, {0, 1, 2, 3}},
    {0x7, 21, "1g.6gb+me", 1, 1, 5952, 14, 1, 1, 0, 1, 1, 1, 4, {0, 1, 2, 3}},
    {0x1, 5, "2g.12gb", 2, 2, 11968, 28, 2, 2, 0, 0, 0, 2, 2, {0, 2}},
    {0x8, 6, "2g.12gb+me", 2, 1, 11968, 28, 2, 2, 0, 1, 1, 2, 2, {0, 2}},
    {0x3, 0, "4g.24gb", 4, 1, 24000, 56, 4, 4, 0, 1, 1, 4, 1, {0}},
    {0},
};

static const struct profile h100_80[] = {
    {0x0, 19, "1g.10gb", 1, 7, 9984, 16, 1, 1, 0, 1, 0, SEVEN_STARTS},
    {0x7, 20, "1g.10gb+me", 1, 1, 9984, 16, 1, 1, 0, 1, 1, SEVEN_STARTS},
    {0x9, 15, "1g.20gb", 1, 4, 20096, 26, 1, 1, 0, 1, 0, PAIR_STARTS},
    {0x1, 14, "2g.20gb", 2, 3, 20096, 32, 2, 2, 0, 2, 0, TWO_SLICE_STARTS},
    {0x2, 9, "3g.40gb", 3, 2, 40448, 60, 3, 3, 0, 3, 0, HALF_STARTS},
    {0x3, 5, "4g.40gb", 4, 1, 40448, 64, 4, 4, 0, 4, 0, LOWER_HALF},
    {0x4, 0, "7g.80gb", 7, 1, 81152, 132, 8, 7, 0, 7, 1, WHOLE},
    {0},
};

static const struct profile h200[] = {
    {0x0, 19, "1g.18gb", 1, 7, 16384, 16, 1, 1, 0, 1, 0, SEVEN_STARTS},
    {0x7, 20, "1g.18gb+me", 1, 1, 16384, 16, 1, 1, 0, 1, 1, SEVEN_STARTS},
    {0x9, 15, "1g.35gb", 1, 4, 33280, 26, 1, 1, 0, 1, 0, PAIR_STARTS},
    {0x1, 14, "2g.35gb", 2, 3, 33280, 32, 2, 2, 0, 2, 0, TWO_SLICE_STARTS},
    {0x2, 9, "3g.71gb", 3, 2, 71424, 60, 3, 3, 0, 3, 0, HALF_STARTS},
    {0x3, 5, "4g.71gb", 4, 1, 71424, 64, 4, 4, 0, 4, 0, LOWER_HALF},
    {0x4, 0, "7g.141gb", 7, 1, 143360, 132, 8, 7, 0, 7, 1, WHOLE},
    {0},
};

#define QUARTERS 3, 4, {0, 3, 6, 9}
#define HALVES 6, 2, {0, 6}
#define TWELVE 12, 1, {0}

static const struct profile rtx_pro_6000[] = {
    {0x0, 14, "1g.24gb", 1, 4, 24192, 46, 1, 1, 1, 1, 0, QUARTERS},
    {0x7, 21, "1g.24gb+me", 1, 1, 24192, 46, 1, 1, 1, 1, 1, QUARTERS},
    {0xA, 47, "1g.24gb+gfx", 1, 4, 24192, 46, 1, 1, 1, 1, 0, QUARTERS},
    {0xF, 65, "1g.24gb+me.all", 1, 1, 24192, 46, 1, 4, 4, 4, 1, QUARTERS},
    {0xD, 67, "1g.24gb-me", 1, 4, 24192, 46, 1, 0, 0, 0, 0, QUARTERS},
    {0x1, 5, "2g.48gb", 2, 2, 48512, 94, 2, 2, 2, 2, 0, HALVES},
    {0xB, 35, "2g.48gb+gfx", 2, 2, 48512, 94, 2, 2, 2, 2, 0, HALVES},
    {0x10, 64, "2g.48gb+me.all", 2, 1, 48512, 94, 2, 4, 4, 4, 1, HALVES},
    {0xE, 66, "2g.48gb-me", 2, 2, 48512, 94, 2, 0, 0, 0, 0, HALVES},
    {0x3, 0, "4g.96gb", 4, 1, 97408, 188, 4, 4, 4, 4, 1, TWELVE},
    {0xC, 32, "4g.96gb+gfx", 4, 1, 97408, 188, 4, 4, 4, 4, 1, TWELVE},
    {0},
};

/* key name | architecture compute-capability pci MiB watts | reset slices devices profiles */
const struct model models[] = {
    {"A30-24GB", "NVIDIA A30", 7, 8, 0, 0x20B7, 24576, 165, true, 4, 4, a30},
    {"A100-SXM4-40GB", "NVIDIA A100-SXM4-40GB", 7, 8, 0, 0x20B0, 40960, 400, true, 8, 7, a100_40},
    {"A100-SXM4-80GB", "NVIDIA A100-SXM4-80GB", 7, 8, 0, 0x20B2, 81920, 400, true, 8, 7, a100_80},
    {"H100-SXM5-80GB", "NVIDIA H100 80GB HBM3", 9, 9, 0, 0x2330, 81559, 700, false, 8, 7, h100_80},
    {"H200-141GB", "NVIDIA H200", 9, 9, 0, 0x2335, 143771, 700, false, 8, 7, h200},
    {"RTX-PRO-6000", "NVIDIA RTX PRO 6000 Blackwell Server Edition", 10, 12, 0, 0x2BB5, 97887, 600, false, 12, 4,
     rtx_pro_6000},
    {"L40S-48GB", "NVIDIA L40S", 8, 8, 9, 0x26B9, 46068, 350, false, 0, 0, NULL},
    {0},
};

const struct model *model_named(const char *key)
{
    for (const struct model *m = models; m->key; m++)
        if (!strcmp(m->key, key))
            return m;
    return NULL;
}

const struct profile *profile_by_enumeration(const struct model *model, unsigned enumeration)
{
    for (const struct profile *p = model->profiles; p && p->name; p++)
        if (p->enumeration == enumeration)
            return p;
    return NULL;
}

const struct profile *profile_by_id(const struct model *model, unsigned id)
{
    for (const struct profile *p = model->profiles; p && p->name; p++)
        if (p->id == id)
            return p;
    return NULL;
}

unsigned slice_multiprocessors(const struct model *model)
{
    const struct profile *one = profile_by_enumeration(model, 0);
    return one ? one->sm : 0;
}

bool takes_media(const struct profile *profile)
{
    return strstr(profile->name, "+me") != NULL;
}
