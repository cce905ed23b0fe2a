// What all kernels share: the packed layout, version 1 (docs/kernels.md), and products on tensor cores.
//
// Fragments. The layout's tiles of 16 rows and 32 columns are those of mma.m16n8k16: lane 4 g + t of a warp holds
// rows 2 g and 2 g + 1 and columns 8 t to 8 t + 7 of a chunk. Which row of the matrix is which row of a fragment does
// not matter as long as sums are stored accordingly, nor does the order of columns as long as inputs have the same.
//
// Codes become pairs of bfloat16 by a table in shared memory, an entry a byte (two codes), 256 bytes apart, with a copy
// for every lane, so that no two lanes meet in a bank. It starts at a multiple of 64 KB: the address of an entry is
// then three bytes of the table's address and lane and one of codes, which takes one instruction.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

struct Matrix {
  const u32* codes;        // [tiles, chunks, bits, 16]
  const u8* scale_codes;   // [tiles, blocks, 2 scale_bits]
  const float* steps;      // [groups]
  const float* offset;     // [1]
  const float* table;      // [2^bits]
  int rows, columns, tiles, chunks, blocks, shift;  // a group is 2^shift blocks
};

#define SCRATCH 64512  // bytes of shared memory before the table
#define COLUMNS 128    // of a stage of four chunks
#define U 4            // chunks of a stage

__device__ __forceinline__ u32 bf16_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ float low_of(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

__device__ __forceinline__ uint2 read_once(const u32* at) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.b32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at));
  return v;
}

// The sums of 16 rows and 8 tokens; lane 4 g + t has rows 2 g (c[0], c[1]) and 2 g + 1, tokens 2 t and 2 t + 1.
__device__ __forceinline__ void product(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.f));
}
__device__ __forceinline__ void add_product(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Scale codes of rows 2 g and 2 g + 1 of a tile's block, one in each of the lower bytes.
template <int SCALE_BITS>
__device__ __forceinline__ u32 two_scale_codes(const u8* base, int g) {
  if (SCALE_BITS == 8) return __ldg(reinterpret_cast<const u16*>(base) + g);
  if (SCALE_BITS == 4) {
    u32 byte = __ldg(base + g);
    return (byte & 15) | ((byte >> 4) << 8);
  }
  u32 pairs = __ldg(base + (g >> 1)) >> (4 * (g & 1));
  u32 found = (pairs & 3) | (((pairs >> 2) & 3) << 8);
  if (SCALE_BITS == 3) {
    u32 high = __ldg(base + 4 + (g >> 2)) >> (2 * (g & 3));
    found |= ((high & 1) << 2) | (((high >> 1) & 1) << 10);
  }
  return found;
}

// The eight codes of a row's octet, one in each nibble.
template <int BITS>
__device__ __forceinline__ u32 nibbles(u32 word, u32 high, int octet) {
  if (BITS == 4) return word;
  u32 low = (word >> (2 * (octet & 1))) & 0x33333333u;
  return BITS == 2 ? low : low | (((high >> octet) & 0x11111111u) << 2);
}

// Where the table lies; `shared` has SCRATCH bytes before it.
__device__ __forceinline__ u32 table_address(const u8* shared) {
  return ((u32)__cvta_generic_to_shared(shared) + SCRATCH + 0xffffu) & ~0xffffu;
}

template <int BITS>
__device__ __forceinline__ void fill_table(u8* shared, u32 at, const float* table, int warp, int warps, int lane) {
  u32* entries = reinterpret_cast<u32*>(shared + (at - (u32)__cvta_generic_to_shared(shared)));
  constexpr int LAST = BITS == 8 ? 255 : (1 << BITS) - 1;
  for (int entry = warp; entry < 256; entry += warps) {
    float low = __ldg(table + (BITS == 8 ? entry : entry & 15 & LAST));
    float high = BITS == 8 ? 0.f : __ldg(table + ((entry >> 4) & LAST));
    entries[entry * 64 + lane] = bf16_pair(low, high);
  }
}

// Four pairs of table entries of an octet; `entry` is the table's address and the lane's place in an entry.
template <int BITS>
__device__ __forceinline__ void look_up(u32 (&pairs)[4], u32 word, u32 high, int octet, u32 entry) {
  auto found = [&](u32 from, int byte) {
    u32 value;
    asm("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(__byte_perm(from, entry, 0x7604 | (byte << 4))));
    return value;
  };
  if (BITS == 8) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      u32 from = j < 2 ? word : high;
      pairs[j] = __byte_perm(found(from, 2 * (j & 1)), found(from, 2 * (j & 1) + 1), 0x5410);
    }
  } else {
    u32 codes = nibbles<BITS>(word, high, octet);
#pragma unroll
    for (int j = 0; j < 4; ++j) pairs[j] = found(codes, j);
  }
}

// Codes and scales of TILES tiles and one stage. Lane t of four reads the scales of block t; PER_BLOCK: chunks.
template <int BITS, int TILES, int PER_BLOCK>
struct Stage {
  static constexpr int BLOCKS = U / PER_BLOCK, WORDS = BITS == 4 || BITS == 2 ? 1 : 2;
  uint2 words[TILES][U][WORDS];
  u32 scale_codes[TILES];
  float steps[TILES][2];
};

template <int BITS, int SCALE_BITS, int TILES, int PER_BLOCK, bool EVEN>
__device__ __forceinline__ void fetch(
    Stage<BITS, TILES, PER_BLOCK>& held, const Matrix& m, int first_tile, int stage, int g, int t) {
  using S = Stage<BITS, TILES, PER_BLOCK>;
#pragma unroll
  for (int r = 0; r < TILES; ++r) {
    int tile = EVEN ? first_tile + r : min(first_tile + r, m.tiles - 1);
    const u32* base = m.codes + ((size_t)tile * m.chunks + stage * U) * (BITS * 16) + 2 * g;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      int at = EVEN ? u * BITS * 16 : (min(stage * U + u, m.chunks - 1) - stage * U) * BITS * 16;
      if (BITS == 4) {
        held.words[r][u][0] = read_once(base + at + t * 16);
      } else if (BITS == 8) {
        held.words[r][u][0] = read_once(base + at + t * 32);
        held.words[r][u][S::WORDS - 1] = read_once(base + at + t * 32 + 16);
      } else {
        held.words[r][u][0] = read_once(base + at + (t >> 1) * 16);
        if (BITS == 3) held.words[r][u][S::WORDS - 1] = read_once(base + at + 32);
      }
    }
    int block = stage * S::BLOCKS + min(t, S::BLOCKS - 1);
    if (!EVEN) block = min(block, m.blocks - 1);
    held.scale_codes[r] = two_scale_codes<SCALE_BITS>(
        m.scale_codes + ((size_t)tile * m.blocks + block) * (2 * SCALE_BITS), g);
    int row = tile * 16 + 2 * g;
    int above = (EVEN ? row : min(row, m.rows - 1)) * m.blocks + block;
    int below = EVEN ? above + m.blocks : min(row + 1, m.rows - 1) * m.blocks + block;
    held.steps[r][0] = __ldg(m.steps + (above >> m.shift));
    held.steps[r][1] = __ldg(m.steps + (below >> m.shift));
  }
}

// Scales of rows 2 g and 2 g + 1 in this lane's block.
template <int BITS, int TILES, int PER_BLOCK>
__device__ __forceinline__ void scales_of(
    float (&scales)[TILES][2], const Stage<BITS, TILES, PER_BLOCK>& held, float offset) {
#pragma unroll
  for (int r = 0; r < TILES; ++r) {
    scales[r][0] = offset + (float)(held.scale_codes[r] & 255) * held.steps[r][0];
    scales[r][1] = offset + (float)(held.scale_codes[r] >> 8) * held.steps[r][1];
  }
}

// sums times the scales of a block, added to acc.
template <int TILES, int TOKEN_TILES>
__device__ __forceinline__ void add_scaled(
    float (&acc)[TILES][TOKEN_TILES][4], const float (&sums)[TILES][TOKEN_TILES][4], const float (&scales)[TILES][2],
    int block, int lane) {
#pragma unroll
  for (int r = 0; r < TILES; ++r) {
    float above = __shfl_sync(0xffffffffu, scales[r][0], (lane & ~3) | block);
    float below = __shfl_sync(0xffffffffu, scales[r][1], (lane & ~3) | block);
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; ++n) {
      acc[r][n][0] += sums[r][n][0] * above;
      acc[r][n][1] += sums[r][n][1] * above;
      acc[r][n][2] += sums[r][n][2] * below;
      acc[r][n][3] += sums[r][n][3] * below;
    }
  }
}

// What follows is for devices of compute capability 9.0 on, with 227 KB of shared memory a block: 63 KB before the table
// and 100 KB after it.

// Inputs come from kernels before this one, which may not have ended when it begins: never read before the wait.
__device__ __forceinline__ uint4 read_input(const u16* at) {
  uint4 v;
  asm volatile("ld.global.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
  return v;
}
__device__ __forceinline__ void copy_16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_4(u32 to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

// A launch may begin before the kernel ahead of it in the stream has ended; from here on that one has.
__device__ __forceinline__ void after_the_kernel_before() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Codes, scale codes and steps of a tile and stage, as they lie in shared memory.
template <int BITS, int SCALE_BITS, int PER_BLOCK>
struct Item {
  static constexpr int BLOCKS = U / PER_BLOCK, WORDS = BITS == 4 || BITS == 2 ? 1 : 2;
  static constexpr int CODES = U * BITS * 64, STEPS = 64 * BLOCKS;  // bytes
  static constexpr int SCALES = (2 * SCALE_BITS * BLOCKS + (SCALE_BITS == 3 ? 2 : 0) + 3) / 4;  // words
  static constexpr int BYTES = CODES + STEPS + ((SCALES * 4 + 15) & ~15);
};

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

// The table by 16 bytes: of four entries a warp's store. `mine`: of 2, 3 or 4 bits, the entry of this lane.
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
