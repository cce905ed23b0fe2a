// x Q^T for tens of tokens, on devices of compute capability 9.0 on: float32 sums of one share of the columns each, or the
// result where there is one share.
//
// A block takes 32 tiles of rows, 8 TOKEN_TILES tokens and some stages of columns: every warp has two tiles of its own.
// Inputs and codes of the next stage are on their way to shared memory while one is computed. Weights are multiplied by
// their scale before the product, so that only one sum of a row and token is held: the scale as two bfloat16 numbers,
// with which a weight is rounded once.
//
// It may begin early, as in streamed.cu. Grid (parts of the rows, shares, tiles of tokens).

#define TOKEN_BYTES (COLUMNS * 2 + 64)  // of a stage's inputs in shared memory; 64 more, so that banks differ
#define TILES 2                         // of a warp
#define WARPS 16

// Twice the same number.
__device__ __forceinline__ u32 both(float value) { return bf16_pair(value, value); }

// A pair of weights: of table entries, times a scale, which is the sum of two.
__device__ __forceinline__ u32 scaled(u32 pair, u32 high, u32 low) {
  u32 small, found;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(small) : "r"(pair), "r"(low));
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(found) : "r"(pair), "r"(high), "r"(small));
  return found;
}

template <int BITS, int SCALE_BITS, int PER_BLOCK, bool EVEN>
__device__ __forceinline__ void bring_codes(u32 to, const Matrix& m, int tile, int stage, int lane) {
  using I = Item<BITS, SCALE_BITS, PER_BLOCK>;
  const u8* codes = reinterpret_cast<const u8*>(m.codes) + ((size_t)tile * m.chunks + stage * U) * (BITS * 64);
  u32 bytes = EVEN ? I::CODES : min(U, m.chunks - stage * U) * (BITS * 64);
#pragma unroll
  for (int k = 0; k < I::CODES; k += 512)
    if ((I::CODES % 512 == 0 && EVEN) || k + lane * 16 < bytes) copy_16(to + k + lane * 16, codes + k + lane * 16);
  int row = tile * 16 + (lane & 15);
  if (!EVEN) row = min(row, m.rows - 1);
#pragma unroll
  for (int k = 0; k < I::BLOCKS; k += 2) {
    int block = stage * I::BLOCKS + (lane >> 4) + k;
    if (!EVEN) block = min(block, m.blocks - 1);
    if (I::BLOCKS > 1 || lane < 16) {
      int step = row * m.blocks + block;
      copy_4(to + I::CODES + k * 64 + lane * 4, m.steps + (step >> m.shift));
    }
  }
  const u8* scales = m.scale_codes + ((size_t)tile * m.blocks + stage * I::BLOCKS) * (2 * SCALE_BITS);
  if (SCALE_BITS == 3) scales = reinterpret_cast<const u8*>(reinterpret_cast<size_t>(scales) & ~(size_t)3);
  scales += lane * 4;
  if (lane < I::SCALES && ((EVEN && SCALE_BITS != 3) || scales < m.scale_codes + (size_t)m.tiles * m.blocks * (2 * SCALE_BITS)))
    copy_4(to + I::CODES + I::STEPS + lane * 4, scales);
}

template <int BITS, int SCALE_BITS, int TOKEN_TILES, int PER_BLOCK, bool EVEN>
__global__ void __launch_bounds__(WARPS * 32, 1) batched(
    const Matrix m, const u16* __restrict__ x, float* __restrict__ partial, u16* __restrict__ y, int tokens) {
  using I = Item<BITS, SCALE_BITS, PER_BLOCK>;
  constexpr int T = TOKEN_TILES * 8;
  static_assert(2 * WARPS * TILES * I::BYTES <= 102400, "two stages of codes fit after the table");
  extern __shared__ __align__(1024) u8 shared[];
  int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  u32 held = (u32)__cvta_generic_to_shared(shared), table = table_address(shared), entry = table | (lane * 4);
  u8* table_at = shared + (table - held);
  u32 ring = table + 65536 + warp * (TILES * I::BYTES);
  const u8* ring_at = table_at + 65536 + warp * (TILES * I::BYTES);
  int first_tile = (blockIdx.x * WARPS + warp) * TILES, stages = (m.chunks + U - 1) / U;
  int begin = blockIdx.y * stages / gridDim.y, end = (blockIdx.y + 1) * stages / gridDim.y;
  bool works = first_tile < m.tiles;
  x += (size_t)blockIdx.z * T * m.columns;
  y += (size_t)blockIdx.z * T * m.rows;
  partial += ((size_t)blockIdx.y * tokens + blockIdx.z * T) * m.rows;
  tokens = min(tokens - (int)blockIdx.z * T, T);
  auto bring_weights = [&](int stage) {
    if (works && stage < end)
#pragma unroll
      for (int r = 0; r < TILES; ++r)
        bring_codes<BITS, SCALE_BITS, PER_BLOCK, EVEN>(
            ring + (stage & 1) * (WARPS * TILES * I::BYTES) + r * I::BYTES, m, min(first_tile + r, m.tiles - 1), stage,
            lane);
  };
  auto bring_inputs = [&](int stage) {
    if (stage < end) {
      u32 to = held + (stage & 1) * (T * TOKEN_BYTES);
#pragma unroll
      for (int i = threadIdx.x; i < T * 16; i += WARPS * 32) {
        int token = i / 16, piece = i % 16, column = stage * COLUMNS + piece * 8;
        const u16* from = x + (size_t)min(token, tokens - 1) * m.columns + min(column, m.columns - 8);
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + token * TOKEN_BYTES + piece * 16),
                     "l"(from), "r"(column < m.columns ? 16 : 0)
                     : "memory");  // zeros where there are no columns
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  bring_weights(begin);
  float mine = __ldg(m.table + (lane & ((1 << BITS) - 1))), offset = __ldg(m.offset);
  fill_table_fast<BITS, WARPS>(table_at, mine, m.table, warp, lane);
  after_the_kernel_before();
  bring_inputs(begin);
  float acc[TILES][TOKEN_TILES][4] = {};
  for (int stage = begin; stage < end; ++stage) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    asm volatile("" : "+r"(entry)::"memory");  // no look-up before the table is there
    bring_weights(stage + 1);
    bring_inputs(stage + 1);
    if (!works) continue;
    const u8* item = ring_at + (stage & 1) * (WARPS * TILES * I::BYTES);
    u32 inputs = held + (stage & 1) * (T * TOKEN_BYTES) + g * TOKEN_BYTES + t * 16;
#pragma unroll
    for (int block = 0; block < I::BLOCKS; ++block) {
      u32 high[TILES][2], low[TILES][2];
#pragma unroll
      for (int r = 0; r < TILES; ++r) {
        const u8* at = item + r * I::BYTES + I::CODES;
        int tile = min(first_tile + r, m.tiles - 1);
        int odd = SCALE_BITS == 3 ? (int)(((size_t)tile * m.blocks + stage * I::BLOCKS) & 1) * 2 : 0;
        float2 steps = *reinterpret_cast<const float2*>(at + block * 64 + g * 8);
        u32 codes = scale_codes_at<SCALE_BITS>(at + I::STEPS + odd + block * (2 * SCALE_BITS), g);
        float above = offset + (float)(codes & 255) * steps.x, below = offset + (float)(codes >> 8) * steps.y;
        high[r][0] = both(above), high[r][1] = both(below);
        low[r][0] = both(above - low_of(high[r][0])), low[r][1] = both(below - low_of(high[r][1]));
      }
#pragma unroll
      for (int c = 0; c < PER_BLOCK; ++c) {
        int u = block * PER_BLOCK + c;
        u32 p[TILES][4], q[TILES][4];
#pragma unroll
        for (int r = 0; r < TILES; ++r) {
          const u8* of = item + r * I::BYTES + u * (BITS * 64) + g * 8;
          uint2 word = *reinterpret_cast<const uint2*>(of + (BITS == 4 ? t : t >> 1) * 64), more = word;
          if (BITS == 3) more = *reinterpret_cast<const uint2*>(of + 128);
          look_up<BITS>(p[r], word.x, more.x, t, entry);
          look_up<BITS>(q[r], word.y, more.y, t, entry);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            p[r][k] = scaled(p[r][k], high[r][0], low[r][0]);
            q[r][k] = scaled(q[r][k], high[r][1], low[r][1]);
          }
        }
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) {
          uint4 b;
          asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                       : "=r"(b.x), "=r"(b.y), "=r"(b.z), "=r"(b.w)
                       : "r"(inputs + n * 8 * TOKEN_BYTES + u * 64));
#pragma unroll
          for (int r = 0; r < TILES; ++r) {
            add_product(acc[r][n], p[r][0], q[r][0], p[r][1], q[r][1], b.x, b.y);
            add_product(acc[r][n], p[r][2], q[r][2], p[r][3], q[r][3], b.z, b.w);
          }
        }
      }
    }
  }
  bool direct = gridDim.y == 1;
#pragma unroll
  for (int r = 0; r < TILES; ++r)
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        int token = n * 8 + 2 * t + c, row = (first_tile + r) * 16 + 2 * g;
        if (token >= tokens || row >= m.rows) continue;  // rows are even in number
        size_t at = (size_t)token * m.rows + row;
        if (direct)
          *reinterpret_cast<u32*>(y + at) = bf16_pair(acc[r][n][c], acc[r][n][2 + c]);
        else
          *reinterpret_cast<float2*>(partial + at) = make_float2(acc[r][n][c], acc[r][n][2 + c]);
      }
}
