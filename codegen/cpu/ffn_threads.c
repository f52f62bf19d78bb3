/* What torch calls: the parts of ffn.c and prefill.c shared out over OpenMP's threads. */

int64_t few(ffn *a)
{
    int64_t T = a->T, D = a->D, thin = 0;
    int threads = (int)a->threads;
    float *parts = malloc(sizeof(float) * threads * T * D);
    lives_of lives;
    if (!parts || !room_for(a, &lives)) { free(parts); return -1; }
#pragma omp parallel num_threads(threads) reduction(+ : thin)
    {
        int64_t id = omp_get_thread_num(), n = omp_get_num_threads();
        if (a->router) {
            score(a, a->R * id / n, a->R * (id + 1) / n);
#pragma omp barrier
        }
#pragma omp single
        {
            if (a->router) choose(a);
            look(a, &lives);
        }
        float *mine = parts + id * T * D;
        memset(mine, 0, sizeof(float) * T * D);
        thin += live_range(a, &lives, lives.work * id / n, lives.work * (id + 1) / n, mine);
        stand_ins(a, id, n, mine);
#pragma omp barrier
        for (int64_t k = T * D * id / n; k < T * D * (id + 1) / n; k++) {
            float s = a->down_bias ? a->down_bias[k % D] : 0.0f;
            for (int64_t i = 0; i < n; i++) s += parts[i * T * D + k];
            a->y[k] = s;
        }
    }
    a->thin = thin;
    free(parts); forget(&lives);
    return 0;
}

/* select from scores, tokens shared out over the threads */
int64_t routes(ffn *a)
{
    int64_t T = a->T;
#pragma omp parallel num_threads((int)a->threads)
    {
        int64_t id = omp_get_thread_num(), n = omp_get_num_threads();
        ffn part = *a;
        part.T = T * (id + 1) / n - T * id / n;
        part.select += T * id / n * a->N;
        part.scores += T * id / n * a->R;
        choose(&part);
    }
    return 0;
}

static int64_t slice(ffn *a)
{
    plan_of p;
    int64_t threads = a->threads > 0 ? a->threads : 1;
    int failed = !divide(a, &p, threads);
#pragma omp parallel num_threads((int)threads)
    {
        int64_t id = omp_get_thread_num();
        float *mine = failed ? NULL : take(1 + id, p.own);
        if (!mine) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < (failed ? 0 : p.lives * p.chunks); item++) first_item(a, &p, item, mine);
#pragma omp for schedule(dynamic)
        for (int64_t s = 0; s < (failed ? 0 : p.strips); s++) second_item(a, &p, s, mine);
        give_back(1 + id, mine);
    }
    drop(&p);
    return failed ? -1 : 0;
}

/* a slice of tokens at a time: what is kept of them (hidden numbers, strips) stays within bounds */
int64_t prefill(ffn *a)
{
    int64_t live = 0;
    for (int64_t t = 0; t < a->T; t += SLICE) {
        ffn part = *a;
        part.T = MIN(SLICE, a->T - t);
        part.x += t * a->D;
        part.y += t * a->D;
        part.select += t * a->N;
        if (slice(&part) < 0) return -1;
        live += part.live;
    }
    a->live = live;
    return 0;
}
