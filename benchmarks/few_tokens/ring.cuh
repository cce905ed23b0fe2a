// The ring of ring.cu, which is compiled after common.cuh and this; the benchmark defines the macros that make variants.

#ifndef PDL
#define PDL 0  // 1: the launch may begin before the one ahead of it has ended
#endif
#ifndef PRE
#define PRE 0  // 1: a block asks for all of its codes to be brought into the L2 cache at its start
#endif
#ifndef RANK_UNITS
#define RANK_UNITS 0  // 1: x L2^T is cut by rank too, and L1 multiplied after a block's first sums, not among them
#endif
#ifndef LIMIT
#define LIMIT (1 << 16)  // polls of an experiment; then it traps
#endif
#define SHARES 8  // of the columns, each a block's (with RANK_UNITS for 16 ranks), in which x L2^T is computed
#define RING 6400   // bytes of a warp, after the table
#define SUMS 49152  // bytes before the table
#define MOST_SLOTS 8

// Inputs come from kernels before this one, which may not have ended when it begins: never read before the wait.
__device__ __forceinline__ uint4 read_input(const u16* at) {
  uint4 v;
  asm volatile("ld.global.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
  return v;
}

template <int BITS, int SCALE_BITS, int PER_BLOCK>
struct Item {
  static constexpr int BLOCKS = U / PER_BLOCK, WORDS = BITS == 4 || BITS == 2 ? 1 : 2;
  static constexpr int CODES = U * BITS * 64, STEPS = 64 * BLOCKS;  // bytes
  static constexpr int SCALES = (2 * SCALE_BITS * BLOCKS + (SCALE_BITS == 3 ? 2 : 0) + 3) / 4;  // words
  static constexpr int BYTES = CODES + STEPS + ((SCALES * 4 + 15) & ~15);
  static constexpr int FIT = RING / BYTES, SLOTS = FIT < MOST_SLOTS ? FIT : MOST_SLOTS;
};

__device__ __forceinline__ void copy_16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_4(u32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// As two_scale_codes, from shared memory.
template <int SCALE_BITS>
__device__ __forceinline__ u32 scale_codes_at(const u8* base, int g) {
  if (SCALE_BITS == 8) return reinterpret_cast<const u16*>(base)[g];
  if (SCALE_BITS == 4) {
    u32 byte = base[g];
    return (byte & 15) | ((byte >> 4) << 8);
  }
  u32 pairs = base[g >> 1] >> (4 * (g & 1));
  u32 found = (pairs & 3) | (((pairs >> 2) & 3) << 8);
  if (SCALE_BITS == 3) {
    u32 high = base[4 + (g >> 2)] >> (2 * (g & 3));
    found |= ((high & 1) << 2) | (((high >> 1) & 1) << 10);
  }
  return found;
}

// The table by 16 bytes: of four entries a warp's store.
template <int BITS, int WARPS>
__device__ __forceinline__ void fill_table_fast(u8* table, float mine, const float* from, int warp, int lane) {
  if (BITS == 8) {
    for (int entry = 4 * warp + (lane >> 3); entry < 256; entry += 4 * WARPS) {
      u32 pair = bf16_pair(__ldg(from + entry), 0.f);
      *reinterpret_cast<uint4*>(table + entry * 256 + (lane & 7) * 16) = make_uint4(pair, pair, pair, pair);
    }
  } else {
    constexpr int LAST = (1 << BITS) - 1;
#pragma unroll
    for (int i = 0; i < 256 / (4 * WARPS); ++i) {
      int entry = 4 * (warp + i * WARPS) + (lane >> 3);
      float low = __shfl_sync(0xffffffffu, mine, entry & 15 & LAST);
      float high = __shfl_sync(0xffffffffu, mine, (entry >> 4) & LAST);
      u32 pair = bf16_pair(low, high);
      *reinterpret_cast<uint4*>(table + entry * 256 + (lane & 7) * 16) = make_uint4(pair, pair, pair, pair);
    }
  }
}

// What a warp will fetch next; slots are filled in the order in which they are read.
template <int BITS, int SCALE_BITS, int WARPS, int PER_BLOCK, bool EVEN>
struct Producer {
  using I = Item<BITS, SCALE_BITS, PER_BLOCK>;
  const u8* codes;   // of the next item, this lane's
  const u8* scales;
  int step;          // row times blocks, and block, of this lane's step
  int base, last, per, count, stage, r;

  __device__ __forceinline__ void place(const Matrix& m, int lane) {
    int tile = base + r;
    codes = reinterpret_cast<const u8*>(m.codes) + ((size_t)tile * m.chunks + stage * U) * (BITS * 64);
    codes += lane * 16;
    size_t begin = ((size_t)tile * m.blocks + stage * I::BLOCKS) * (2 * SCALE_BITS);
    scales = m.scale_codes + begin + lane * 4;
    step = (tile * 16 + (lane & 15)) * m.blocks + stage * I::BLOCKS + (lane >> 4);
  }
  __device__ __forceinline__ void fill(const Matrix& m, u32 to, int stages, int warp, int lane) {
    if (base < last) {
      u32 bytes = EVEN ? I::CODES : min(U, m.chunks - stage * U) * (BITS * 64);
#pragma unroll
      for (int k = 0; k < I::CODES; k += 512)
        if ((I::CODES % 512 == 0 && EVEN) || k + lane * 16 < bytes) copy_16(to + k + lane * 16, codes + k);
#pragma unroll
      for (int k = 0; k < I::BLOCKS; k += 2) {
        int at = step + k;
        if (!EVEN) {
          int block = min(stage * I::BLOCKS + (lane >> 4) + k, m.blocks - 1);
          at = min((base + r) * 16 + (lane & 15), m.rows - 1) * m.blocks + block;
        }
        if (I::BLOCKS > 1 || lane < 16) copy_4(to + I::CODES + k * 64 + lane * 4, m.steps + (at >> m.shift));
      }
      const u8* word = SCALE_BITS == 3 ? reinterpret_cast<const u8*>(reinterpret_cast<size_t>(scales) & ~(size_t)3) : scales;
      if (lane < I::SCALES && (EVEN || word < m.scale_codes + (size_t)m.tiles * m.blocks * (2 * SCALE_BITS)))
        copy_4(to + I::CODES + I::STEPS + lane * 4, word);
      if (++r < count) {
        codes += m.chunks * (BITS * 64);
        scales += m.blocks * (2 * SCALE_BITS);
        step += m.blocks * 16;
      } else {
        r = 0;
        stage += WARPS;
        if (stage >= stages) {
          stage = warp;
          base += per;
          count = min(per, last - base);
        }
        place(m, lane);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
};
